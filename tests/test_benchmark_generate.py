from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path

import pytest
from tiny_models import tiny_llama
from transformers import PreTrainedTokenizerFast

from entkd.config import JsonData
from entkd.data import prepare
from entkd.models import save_model


@pytest.fixture
def arguments(tiny_tokenizer: Path, tmp_path: Path) -> list[str]:
    rows = [{"prompt": f"{'word ' * (n % 4)}question {n}", "response": f"answer {n}"} for n in range(9)]
    save_model(tiny_llama(), PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer), tmp_path / "teacher")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = JsonData(files={"train": tmp_path / "rows.json"}, template="plain", dev=1, test=1, max_tokens=24)
    prepare(data, tmp_path / "teacher", tmp_path / "data")
    paths = {"teacher": tmp_path / "teacher", "data": tmp_path / "data", "output": tmp_path / "new" / "generate.csv"}
    sizes = {"prompts": 5, "batch": 2, "new-tokens": 4, "repeats": 1}
    return [str(part) for key, value in (paths | sizes).items() for part in (f"--{key}", value)]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    return importlib.import_module("benchmarks.generate")


def test_table_has_a_row_for_each_setting(benchmark, arguments: list[str], tmp_path: Path) -> None:
    returned = benchmark.main(arguments)
    rows = list(csv.DictReader((tmp_path / "new" / "generate.csv").open()))
    assert [row["setting"] for row in rows] == list(benchmark.SETTINGS)
    for row, values in zip(rows, returned, strict=True):
        assert row == {key: str(value) for key, value in values.items()}
        rates = float(row["entkd_tokens_per_s"]), float(row["transformers_tokens_per_s"])
        assert min(rates) > 0
        assert float(row["ratio"]) == pytest.approx(rates[0] / rates[1], abs=0.05, rel=0.05)


def test_different_greedy_continuations_end_it(benchmark, arguments: list[str], monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "generate", lambda model, tokenizer, prompts, **options: [[5]] * len(prompts))
    with pytest.raises(SystemExit, match="greedy continuations in fp32 differ"):
        benchmark.main(arguments)
