"""The workflow: what is rerun after which change, and what is refused before anything runs.

`entkd` is replaced by a script that only makes files, so each test is about Snakemake's decisions alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
EXPERIMENT = {
    "name": "demo",
    "data": {"source": "json", "files": {"train": "train.jsonl"}},
    "student": {"init": "layers", "layers": [0, 1, 2]},
    "training": {"steps": 2},
    "method": {"divergence": "forward_kl"},
    "arms": {
        "kd": {"role": "factorial"},
        "full": {"role": "factorial", "curriculum": {"kappa": 0.8}, "features": {}},
        "seqkd": {"pipeline": "seqkd", "divergence": None, "ce": {}},
        "gkd": {"pipeline": "onpolicy", "on_policy": "gkd"},
    },
    "seeds": [0, 1],
    "suites": {"tiny": {"tasks": [{"name": "entkd_heldout", "metric": "bits_per_byte", "direction": "lower"}]}},
    "runtime": {"gpus": 0, "memory_gib": 0.1},
}
ROW = '{"prompt": "a", "response": "b"}\n'
ARMS, SEEDS = ("kd", "full", "seqkd", "gkd"), (0, 1)
ANALYSIS = {"ablation_table": 1, "figures": 1, "default": 1}
COLLECT = {"collect_scores": 1, **ANALYSIS}


def snakemake_in(
    folder: Path, *arguments: str, cores: tuple[str, ...] = ("--cores", "2")
) -> subprocess.CompletedProcess[str]:
    """Snakemake in ``folder``, with the stand-in for `entkd` first on PATH."""
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "snakemake", *cores, "--nocolor", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def write_experiment(folder: Path, change: Callable[[dict], object] = lambda _: None) -> None:
    experiment = yaml.safe_load(yaml.safe_dump(EXPERIMENT))
    change(experiment)
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config/config.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False), encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the workflow in which the whole experiment has run once."""
    folder = tmp_path_factory.mktemp("workflow")
    shutil.copy(ROOT / "Snakefile", folder)
    for name in ("workflow", "profiles"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "bin").mkdir()
    shutil.copy(ROOT / "tests/fake_entkd.sh", folder / "bin/entkd")
    (folder / "train.jsonl").write_text(ROW, encoding="utf-8")
    write_experiment(folder)
    run = snakemake_in(folder)
    assert run.returncode == 0, run.stderr
    # Later tests call more, and tests that run in parallel may come in any order.
    shutil.copy(folder / "calls.txt", folder / "first_calls.txt")
    return folder


def would_run(folder: Path, *arguments: str) -> tuple[Counter[str], Counter[str]]:
    """Jobs of a dry run by rule, and the (arm, seed) of those that train."""
    dry = snakemake_in(folder, "--dry-run", *arguments)
    assert dry.returncode == 0, dry.stderr
    text = dry.stdout + dry.stderr
    blocks = re.split(r"^(?:local)?rule ", text, flags=re.M)[1:]
    rules = Counter(block.partition(":")[0] for block in blocks)
    trained = [block for block in blocks if block.startswith(("distill:", "seqkd:", "onpolicy:"))]
    return rules, Counter(match[1] for block in trained if (match := re.search(r"wildcards: (.*)", block)))


def test_first_run_makes_every_stage_once(finished: Path) -> None:
    calls = [line.split() for line in (finished / "first_calls.txt").read_text().splitlines()]
    counts = Counter(call[0] for call in calls)
    students = len(ARMS) * len(SEEDS)
    assert counts == {
        "prepare-teacher": 1, "prepare-data": 1, "seqkd-data": 1, "signals": 1, "init-student": 1,
        "distill": students, "score": students + 2, "collect-scores": 1, "collect-runs": 1, "table": 1, "figures": 1,
    }  # fmt: skip
    for call in calls:  # only arms with a divergence or a component read the signals
        if call[0] == "distill":
            path = "results/signals/smollm2-135m-instruct/json/manifest.json"
            assert (path in call) == ("seqkd" not in call[-1])
            # and only those whose students write text get the teacher itself
            assert ("results/teachers/smollm2-135m-instruct" in call) == ("gkd" in call[-1])


def test_jobs_that_ask_for_no_gpu_see_none(finished: Path) -> None:
    assert set((finished / "devices.txt").read_text().splitlines()) == {""}


def test_second_run_does_nothing(finished: Path) -> None:
    write_experiment(finished)
    assert would_run(finished) == (Counter(), Counter())


def test_editing_one_arm_reruns_that_arm(finished: Path) -> None:
    def change(experiment: dict) -> None:
        experiment["arms"]["full"] |= {"curriculum": {"kappa": 0.5}, "features": {"threshold": 0.9}}

    write_experiment(finished, change)
    rules, trained = would_run(finished)
    assert trained == {"arm=full, seed=0": 1, "arm=full, seed=1": 1}
    assert rules == {"distill": 2, "score": 2, "collect_runs": 1, **COLLECT}


def test_one_more_task_only_rescores(finished: Path) -> None:
    task = {"name": "blimp", "metric": "acc", "direction": "higher"}
    write_experiment(finished, lambda experiment: experiment["suites"]["tiny"]["tasks"].append(task))
    rules, _ = would_run(finished)
    assert rules == {"score": len(ARMS) * len(SEEDS) + 2, **COLLECT}


def test_one_more_seed_trains_one_seed(finished: Path) -> None:
    write_experiment(finished, lambda experiment: experiment["seeds"].append(2))
    rules, trained = would_run(finished)
    assert trained == {f"arm={arm}, seed=2": 1 for arm in ARMS}
    assert rules == {"distill": 2, "seqkd": 1, "onpolicy": 1, "score": 4, "collect_runs": 1, **COLLECT}


def test_reference_roles_and_gaps_only_rebuild_the_table(finished: Path) -> None:
    def change(experiment: dict) -> None:
        experiment["analysis"] = {"reference": "full"}
        experiment["arms"]["kd"]["role"] = "control"
        experiment["suites"]["tiny"]["tasks"][0] |= {"min_gap": 0.1, "direction": "higher"}

    write_experiment(finished, change)
    rules, _ = would_run(finished)
    # without a complete factorial there is no figure of the effects
    assert rules == ANALYSIS


def test_runtime_and_shell_lines_rerun_nothing(finished: Path) -> None:
    changes = {"threads": 2, "memory_gib": 0.2, "scoring_gib": 9, "save_minutes": 1, "log_every": 3}
    changes["cache"] = "elsewhere"
    write_experiment(finished, lambda experiment: experiment["runtime"].update(changes))
    rules = finished / "workflow/rules/distill.smk"
    text = rules.read_text()
    rules.write_text(text.replace('"entkd distill --settings', '"entkd  distill --settings'))
    assert would_run(finished) == (Counter(), Counter())
    rules.write_text(text)


def test_shell_lines_take_what_is_no_param(finished: Path) -> None:
    calls = [line.split() for line in (finished / "first_calls.txt").read_text().splitlines()]
    for stage, option, value in (
        ("signals", "--cache", "cache"), ("distill", "--save-minutes", "5.0"), ("distill", "--log-every", "10"),
        ("score", "--memory-gib", "2.0"),
    ):  # fmt: skip
        call = next(call for call in calls if call[0] == stage)
        assert call[call.index(option) + 1] == value


def test_files_of_a_task_folder_are_inputs_but_what_python_leaves_is_not(finished: Path) -> None:
    folder = finished / "tasks"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("mine.yaml", "template", "__pycache__/utils.pyc", ".git/index"):
        (folder / name).write_text("x", encoding="utf-8")
    write_experiment(finished, lambda experiment: experiment["suites"]["tiny"].update(include_path="tasks"))
    dry = snakemake_in(finished, "--dry-run", "results/scores/kd/seed0/tiny.csv")
    inputs = re.search(r"input: (.*)", dry.stdout + dry.stderr)
    assert inputs is not None, dry.stderr
    given = [name for name in inputs[1].split(", ") if name.startswith("tasks/")]
    assert given == ["tasks/mine.yaml", "tasks/template"]


def test_visible_files_of_a_local_teacher_are_inputs(finished: Path) -> None:
    folder = finished / "model"
    (folder / ".cache").mkdir(parents=True)
    (folder / "config.json").write_text('{"num_hidden_layers": 3}', encoding="utf-8")
    for name in ("chat_template.jinja", "merges.txt", "model.safetensors", ".gitattributes", ".cache/x"):
        (folder / name).write_text("x", encoding="utf-8")
    write_experiment(finished, lambda experiment: experiment.update(teacher={"source": "local", "path": "model"}))
    dry = snakemake_in(finished, "--dry-run", "--forcerun", "prepare_teacher", "--", "prepare_teacher")
    inputs = re.search(r"input: (.*)", dry.stdout + dry.stderr)
    assert inputs is not None, dry.stderr
    names = ("chat_template.jinja", "config.json", "merges.txt", "model.safetensors")
    assert inputs[1].split(", ") == [f"model/{name}" for name in names]


def test_new_training_data_reruns_from_the_data_on(finished: Path) -> None:
    write_experiment(finished)
    stat = (finished / "train.jsonl").stat()
    (finished / "train.jsonl").write_text(ROW * 2, encoding="utf-8")
    rules, trained = would_run(finished)
    assert rules["prepare_data"] == rules["teacher_signals"] == rules["seqkd_data"] == 1
    assert rules["prepare_teacher"] == rules["init_student"] == 0
    assert trained.total() == len(ARMS) * len(SEEDS)
    (finished / "train.jsonl").write_text(ROW, encoding="utf-8")
    os.utime(finished / "train.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_another_experiment_replaces_the_first(finished: Path) -> None:
    write_experiment(finished)
    other = yaml.safe_load(yaml.safe_dump(EXPERIMENT)) | {"name": "other", "seeds": [7]}
    other["arms"] = {"kd": {"curriculum": {}}}
    other["teacher"] = {"prepare": "finetune", "finetune": {"steps": 1}}
    (finished / "other.yaml").write_text(yaml.safe_dump(other))
    run = snakemake_in(finished, "--config", "experiment=other.yaml", "training={steps: 3}")
    assert run.returncode == 0, run.stderr
    calls = [line.split() for line in (finished / "calls.txt").read_text().splitlines() if "results/other/" in line]
    students = [call for call in calls if call[0] == "distill"]
    assert [call[-1] for call in students] == ["results/other/students/kd/seed7"]
    assert '"steps":3' in students[0][2]
    assert [call[0] for call in calls if "teachers" in call[-1]] == ["prepare-teacher", "finetune-teacher"]


def test_figures_from_published_scores_alone(finished: Path, tmp_path: Path) -> None:
    for name in ("Snakefile", "workflow", "profiles", "config", "bin", "train.jsonl"):
        copy = shutil.copytree if (finished / name).is_dir() else shutil.copy
        copy(finished / name, tmp_path / name)
    write_experiment(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/scores.csv").write_text("arm\n", encoding="utf-8")
    rules, _ = would_run(tmp_path, "figures")
    assert rules == {"ablation_table": 1, "figures": 1}


BAD_ARMS = [
    ({"curriculum": {"kapa": 1}}, "arms.x.curriculum: unknown key `kapa`; did you mean `kappa`?"),
    ({"pipeline": "seqdk", "ce": {}}, "arms.x.pipeline: unknown name `seqdk`; did you mean `seqkd`?"),
    ({"on_policy": "distillm"}, "arms.x.on_policy: distillm lets the teacher read what the student writes"),
]


@pytest.mark.parametrize(("arm", "message"), BAD_ARMS)
def test_bad_experiment_stops_before_any_job(finished: Path, arm: dict, message: str) -> None:
    write_experiment(finished, lambda experiment: experiment["arms"].update(x=arm))
    before = (finished / "calls.txt").read_text()
    run = snakemake_in(finished, "results/ablation_table.csv")
    assert run.returncode == 1
    assert message in run.stderr + run.stdout
    assert (finished / "calls.txt").read_text() == before


@pytest.mark.parametrize("arguments", [("--unlock",), ("--report", "report.zip")])
def test_what_needs_no_cores_gets_by_without(finished: Path, arguments: tuple[str, ...]) -> None:
    write_experiment(finished)
    run = snakemake_in(finished, *arguments, cores=())
    assert run.returncode == 0, run.stderr


def test_lint_finds_nothing() -> None:
    run = snakemake_in(ROOT, "--lint")
    assert run.returncode == 0, run.stdout + run.stderr


def test_slurm_profile_knows_every_rule() -> None:
    """A rule that the profile forgets would run on one core, and a table would ask for hours."""
    profile = yaml.safe_load((ROOT / "profiles/slurm/profile.yaml").read_text(encoding="utf-8"))
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "workflow/rules").rglob("*.smk")]
    named = re.findall(r"^ *(?:rule (\w+):|use rule \w+ as (\w+) with:)", "\n".join(texts), flags=re.MULTILINE)
    assert {one or other for one, other in named} == {*profile["set-threads"], *profile["set-resources"]}
