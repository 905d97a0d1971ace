"""Tasks of our own for lm-eval, as YAML files: held-out bits per byte, ROUGE-L, minimal pairs."""

from __future__ import annotations

import re
from pathlib import Path

PHENOMENA = (
    "agreement_across_phrase", "agreement_across_relative", "agreement_simple", "determiner_noun", "negative_polarity",
    "passive_transitive", "past_tense", "reflexive_gender", "reflexive_number",
)  # fmt: skip
"""Kinds of minimal pairs, each a task."""
OWN_TASKS = {
    "entkd_heldout": ("bits_per_byte",),
    "entkd_rouge": ("rougeL",),
    "entkd_minimal_pairs": ("acc",),
    **{f"entkd_pairs_{phenomenon}": ("acc",) for phenomenon in PHENOMENA},
}
"""Our tasks and their metrics, as the YAML files beside this one say, for those who cannot wait for lm-eval."""


def task_names(folder: Path) -> set[str]:
    """Names of the tasks and groups that the YAML files under ``folder`` define; nothing where it is no folder."""
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in sorted(folder.rglob("*.y*ml"))]
    return {name for text in texts for name in re.findall(r"^(?:task|group):[ \t]*[\"']?([\w.-]+)", text, re.MULTILINE)}
