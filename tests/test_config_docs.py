"""The generated reference: in step with the code, complete, and true about the demo."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from entkd.config import Experiment
from entkd.config.docs import readme_text, schema_text, write_docs

CONFIG = Path(__file__).parents[1] / "config"


def test_generated_files_are_in_step(tmp_path: Path) -> None:
    write_docs(tmp_path)
    for name in ("schema.json", "README.md"):
        assert (tmp_path / name).read_text() == (CONFIG / name).read_text(), "run `entkd config-docs --output config`"


def test_every_key_is_described() -> None:
    rows = [line for line in readme_text().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if not row.split(" | ")[-1].rstrip(" |")] == []


def test_schema_knows_the_top_level_and_the_arms() -> None:
    schema = json.loads(schema_text())
    assert set(schema["properties"]) == set(Experiment.model_fields)
    assert {"role", "pipeline", "curriculum", "divergence"} <= set(schema["$defs"]["Arm"]["properties"])
    demo = yaml.safe_load((CONFIG / "config.yaml").read_text())
    assert set(demo) <= set(schema["properties"])
    assert set(schema["required"]) <= set(demo)
    keys = {key for arm in demo["arms"].values() for key in arm}
    assert keys <= set(schema["$defs"]["Arm"]["properties"])
