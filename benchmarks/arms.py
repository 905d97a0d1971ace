"""What the teacher costs an experiment, against its number of arms: one pass, however many read it.

Runs the real workflow up to the students, once for each number of arms, with a cache of its own each time, and reads
the ledger from the records: ``python -m benchmarks.arms --arms 4 24``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.timing import write_csv
from entkd.figures.style import BLUE, GREY, STYLE, TEXT_WIDTH, save

ROOT = Path(__file__).parents[1]
EPOCHS = 2


def experiment(rows: Path, arms: int) -> dict[str, Any]:
    """Off-policy arms over one teacher and the rows of a file: kd, and token temperatures of different strength."""
    strengths = [round(-1 + 2 * (index + 1) / arms, 4) for index in range(arms - 1)]
    return {
        "name": "arms",
        "teacher": {"source": "bundled"},
        "data": {"source": "json", "files": {"train": str(rows)}, "limit": 48, "dev": 8, "test": 8, "max_tokens": 256},
        "student": {"init": "layers", "layers": [0, 29]},
        "signals": {"features": None},
        "training": {"epochs": EPOCHS, "block": 256, "eval_every": 1000},
        "method": {"divergence": "forward_kl"},
        "arms": {"kd": {}} | {f"t{index}": {"temperature": {"c": c or 0.01}} for index, c in enumerate(strengths)},
        "seeds": [0],
        "suites": {"none": {"tasks": [{"name": "entkd_heldout", "metric": "bits_per_byte", "direction": "lower"}]}},
        "runtime": {"threads": 1, "memory_gib": 3},
    }


def measure(rows: Path, arms: int) -> dict[str, object]:
    """Run an experiment and read what the teacher and the students cost."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copy(ROOT / "Snakefile", folder)
        for name in ("workflow", "profiles"):
            shutil.copytree(ROOT / name, folder / name)
        described = experiment(rows.resolve(), arms)
        (folder / "arms.yaml").write_text(json.dumps(described), encoding="utf-8")  # JSON is YAML
        results = folder / "results/arms"
        targets = [f"results/arms/students/{arm}/seed0/run.json" for arm in described["arms"]]
        command = [sys.executable, "-m", "snakemake", "--cores", "all", "--config", "experiment=arms.yaml"]
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        ended = subprocess.run([*command, "--", *targets], cwd=folder, env=environment, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"the experiment of {arms} arms failed:\n{ended.stderr[-4000:]}")
        runs = [json.loads((folder / target).read_text(encoding="utf-8")) for target in targets]
        (signals,) = results.glob("signals/*/*/manifest.json")
        summary = json.loads(signals.read_text(encoding="utf-8"))["summary"]
    ledgers = {run["teacher_tokens"] for run in runs}
    if ledgers != {summary["teacher_tokens"]}:
        raise SystemExit(f"runs state {ledgers} teacher tokens, the store {summary['teacher_tokens']}")
    return {
        "arms": arms,
        "teacher_tokens": summary["teacher_tokens"],
        "teacher_seconds": summary["seconds"],
        "teacher_jobs": ended.stderr.count("rule teacher_signals:"),
        "student_seconds": round(sum(run["seconds"] for run in runs), 1),
        # What the teacher would read if every arm ran it in every epoch, as trainers without a store do.
        "teacher_tokens_without_store": summary["teacher_tokens"] * arms * EPOCHS,
    }


def figure(rows: Sequence[Mapping[str, Any]], stem: Path) -> None:
    """Teacher tokens against arms, with a store and without."""
    with matplotlib.rc_context(fname=STYLE):
        chart = matplotlib.figure.Figure(figsize=(0.5 * TEXT_WIDTH, 0.38 * TEXT_WIDTH))
        axes = chart.subplots()
        arms = [row["arms"] for row in rows]
        for key, label, color in (
            ("teacher_tokens_without_store", f"a pass per arm and epoch ({EPOCHS} epochs)", GREY),
            ("teacher_tokens", "entkd: one pass", BLUE),
        ):
            axes.plot(arms, [row[key] / 1000 for row in rows], "o-", color=color, label=label)
        axes.set(xlabel="arms", ylabel="thousand tokens read by the teacher", ylim=(0, None), xlim=(0, None))
        axes.legend()
        save(chart, stem.parent, stem.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=Path, default=ROOT / "tests/tiny/train.jsonl", help="jsonl: prompt, response")
    parser.add_argument("--arms", type=int, nargs="+", default=[4, 24], help="numbers of arms (4 24)")
    parser.add_argument("--output", type=Path, default=ROOT / "results/bench", help="folder of the results")
    arguments = parser.parse_args()
    rows = [measure(arguments.rows, arms) for arms in arguments.arms]
    write_csv(arguments.output / "arms.csv", rows)
    figure(rows, arguments.output / "arms")
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
