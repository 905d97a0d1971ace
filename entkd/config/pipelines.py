"""Which pipeline an arm's method needs, and which methods a pipeline serves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from entkd.config.errors import unknown_name
from entkd.config.method import Method

ON_POLICY = "onpolicy"
"""The pipeline whose training jobs get the teacher itself, not only its stored signals."""


def lacking_pipeline(pipeline: str, method: Method) -> Iterator[tuple[str, str]]:
    """What of an arm does not fit its pipeline: the key, and why, with the remedy."""
    if method.on_policy is not None and pipeline != ON_POLICY:
        yield (
            "on_policy",
            f"{method.on_policy.name} lets the teacher read what the student writes, and `pipeline: {pipeline}` gives "
            f"the training no teacher; set `pipeline: {ON_POLICY}`",
        )
    if method.on_policy is not None and method.needs_difficulty and method.difficulty.source != "teacher_entropy":
        yield (
            "difficulty.source",
            f"{method.difficulty.source} is not known of text that the student writes; use teacher_entropy",
        )
    if method.on_policy is None and pipeline == ON_POLICY:
        yield (
            "pipeline",
            f"{ON_POLICY} trains on text that the student writes, and nothing says when; set `on_policy: gkd` or "
            "`on_policy: distillm`, or remove the pipeline",
        )


def unserved(pipelines: Mapping[str, str], workflow: Path) -> Iterator[str]:
    """One line for each arm (name → pipeline) that no rules file of a workflow trains; none where there is no workflow.

    The workflow itself finds out, too, as it knows which of its files are included; this is for `entkd check`.
    """
    rules = (file.read_text(encoding="utf-8") for file in workflow.rglob("*.smk"))
    served = {name for text in rules for name in re.findall(r"""\barms_of\(\s*["']([^"']+)["']""", text)}
    for arm, pipeline in pipelines.items():
        if served and pipeline not in served:
            yield unknown_name(f"arms.{arm}.pipeline", pipeline, served)
