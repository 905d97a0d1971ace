"""Reading experiments: every bad input is one line with file, path, value, what is allowed, nearest match."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from entkd.config import CrossEntropy, Experiment, load_experiment
from entkd.config.errors import ConfigError
from entkd.names import COMPONENTS

ROOT = Path(__file__).parents[1]
DELETED = object()


def minimal() -> dict[str, Any]:
    return {
        "data": {"source": "synthetic"},
        "training": {"steps": 2},
        "method": {"divergence": "forward_kl"},
        "arms": {"kd": {"role": "factorial"}, "full": {"curriculum": {}, "features": {}}},
        "suites": {"demo": {"tasks": [{"name": "entkd_heldout", "metric": "bits_per_byte", "direction": "lower"}]}},
    }


def change(settings: Any, path: str, value: Any) -> None:
    """Set (or delete) the value at ``a/b/0/c``."""
    *parents, last = path.split("/")
    for key in parents:
        settings = settings[int(key)] if isinstance(settings, list) else settings.setdefault(key, {})
    if value is DELETED:
        del settings[last]
    else:
        settings[last] = value


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Experiment]:
    def load(settings: dict[str, Any], overrides: dict[str, Any] | None = None) -> Experiment:
        file = tmp_path / "x.yaml"
        file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        return load_experiment(file, overrides)

    return load


BAD = [
    ("trainig", {}, "unknown key `trainig`; did you mean `training`? Known: analysis, arms, data,"),
    ("training", DELETED, "`training` is missing. How long and how it learns."),
    ("training/lr", -1, "training.lr: -1 must be greater than 0"),
    ("training/steps", "fast", 'training.steps: "fast" must be a whole number'),
    ("training/betas", [True, 0.9], "training: betas: true is allowed only where true or false is asked for"),
    ("seeds", [True], "seeds: true is allowed only where true or false is asked for"),
    ("method/curriculum", True, "method: curriculum: true is allowed only where true or false is asked for; write "),
    (
        "arms/full/curriculum",
        False,
        "arms.full: curriculum: false is allowed only where true or false is asked for; write `c",
    ),
    ("seeds", 3, "seeds: 3 must be a list; write `[3]`"),
    ("name", 7, 'name: 7 must be text; write it in quotes: `"7"`'),
    ("training/steps", True, "training: steps: true is allowed only where true or false is asked for"),
    ("training/epochs", 1, "training: give exactly one of steps, epochs and budget"),
    ("training/micro_blocks", 3, "training: blocks_per_step 2 is not a multiple of micro_blocks 3"),
    ("training/block", 256, "data.max_tokens: 512 is more than training.block 256"),
    ("training/lr", float("nan"), "training.lr: NaN must be"),
    ("arms", [1], "arms: [1] must be a mapping of settings"),
    ("arms/kd/role", "factoral", 'arms.kd.role: "factoral" must be one of factorial, baseline, control; did you mean'),
    (
        "arms/full/curriculum",
        {"kapa": 1},
        "arms.full.curriculum: unknown key `kapa`; did you mean `kappa`? Known:",
    ),
    ("arms/full/temperature", {"base": -1}, "arms.full.temperature.base: -1 must be greater than 0"),
    (
        "arms/x",
        {"curiculum": {}},
        "arms.x: unknown key `curiculum`; did you mean `curriculum`? Known: approach, ce, curriculum,",
    ),
    ("arms/x", {"curriculum": None}, "arms.x.curriculum: null removes `curriculum`, but the method has none"),
    ("arms/x", {"role": "control"}, "arms.x: the same experiment as arms.kd; remove one of them"),
    ("arms/x", {"divergence": None}, "arms.x: a method needs a divergence, or ce, or both"),
    ("arms/Big", {"ce": {}}, 'arms.Big: "Big" must match ^[a-z0-9][a-z0-9_.=-]*$ (lower-case letters'),
    ("arms/teacher", {"ce": {}}, "arms.teacher: this name stands for a reference row of the table"),
    (
        "arms/x",
        {"features": {"threshold": 0.5}},
        "arms.x.features.threshold: 0.5 is below signals.features.",
    ),
    (
        "arms/x",
        {"features": {"tokens": "random"}},
        "arms.x.features.tokens: random needs `signals.features.",
    ),
    ("arms/x", {"features": {"points": 2}}, "arms.x.features.points: 2 does not divide signals.features.points 3"),
    ("signals/features", None, "arms.full.features: needs hidden states, and signals.features is null"),
    ("method/divergence", "jds", "method.divergence.name: unknown name `jds`; did you mean `jsd`? Known: forward_kl,"),
    (
        "method/divergence",
        {"name": "jsd", "bta": 1},
        "method.divergence: unknown key `bta`; did you mean `beta`?",
    ),
    ("method/divergence", {"beta": 1}, "method.divergence: `name` is missing"),
    ("data/source", "hubb", "data.source: unknown name `hubb`; did you mean `hub`? Known: synthetic, json, hub"),
    ("data/trian", 3, "data: unknown key `trian`; did you mean `train`? Known: batch,"),
    ("data", {"source": "json"}, "data: `files` is missing. File of each split"),
    (
        "data",
        {"source": "json", "files": {"train": "no.jsonl"}},
        "data.files.train: no file `no.jsonl` (",
    ),
    (
        "data",
        {"source": "json", "files": {"tain": "x"}},
        'data.files.tain: "tain" must be one of train, dev, test',
    ),
    ("data", "text", 'data: "text" must be a mapping of settings'),
    ("teacher", {"source": "hub", "repo": "a/b"}, "teacher: `source: hub` needs `revision`"),
    ("teacher", {"path": "a"}, "teacher: `path` means nothing with `source: bundled`"),
    ("teacher", {"source": "local", "path": "no"}, "teacher.path: `no` is not a model folder: it has no config.json"),
    ("teacher/prepare", "finetune", "teacher: `finetune` settings and `prepare: finetune` go together"),
    ("student", {"init": "local"}, "student: `init: local` needs `path`"),
    ("suites/demo/tasks/0/direction", "up", 'suites.demo.tasks[0].direction: "up" must be one of higher, lower'),
    ("suites/demo/tasks", [], "suites.demo.tasks: [] needs at least 1 entry"),
    ("suites/demo/include_path", "no", "suites.demo.include_path: no folder `no` (working directory"),
    ("analysis/reference", "kdd", "analysis.reference: unknown name `kdd`; did you mean `kd`? Known: full, kd"),
    (
        "arms",
        {"kd": {"role": "factorial"}}
        | {n: {"role": "factorial", "curriculum": {"kappa": k}} for n, k in (("a", 1), ("x", 0.5))},
        "arms.x.role: `factorial` makes it the cell `curriculum`, which arms.a already is; give one of them the role",
    ),
    (
        "arms",
        {
            name: {"role": "factorial", "divergence": d}
            for name, d in (("kd", "forward_kl"), ("j", "jsd"), ("t", "tvd"))
        },
        "arms.t.role: `factorial` on `tvd`, beside arms on `forward_kl` and `jsd`; a design has at most two",
    ),
    ("seeds", [-1], "seeds[0]: -1 must be greater than or equal to 0"),
    ("data/seed", -1, "data.seed: -1 must be greater than or equal to 0"),
    ("training/betas", [0.9, 1.0], "training.betas[1]: 1.0 must be less than 1"),
    ("training/betas", [-0.1, 0.9], "training.betas[0]: -0.1 must be greater than or equal to 0"),
    ("student/layers", [-1, 3], "student.layers[0]: -1 must be greater than or equal to 0"),
    ("data/template", "plain", "data: template plain: synthetic data need `template: chat`"),
    ("data/min_prompt_tokens", 49, "data: min_prompt_tokens 49 is more than max_prompt_tokens 48"),
    ("data/min_response_tokens", 129, "data: min_response_tokens 129 is more than max_response_tokens 128"),
    (
        "teacher",
        {"prepare": "finetune", "finetune": {"steps": 1, "block": 256}},
        "data.max_tokens: 512 is more than teacher.finetune.block 256",
    ),
    ("training/log_every", 1, "training: unknown key `log_every`; did you mean"),
    ("seeds", [0, 0], "seeds: [0, 0] repeat themselves"),
    ("runtime/gpus", "some", 'runtime.gpus: "some" must be one of auto, 0, 1'),
    ("name", "scores", "name: `scores` is a folder of the demo's results; choose another"),
    ("signals", {"sparse": {"top_k": 8}}, "signals: `sparse` means nothing with `mode: hidden`; remove it or set"),
    ("signals", {"mode": "sparse", "sparse": {"topk": 8}}, "signals.sparse: unknown key `topk`; did you mean `top_k`?"),
    (
        "signals",
        {"mode": "sparse", "sparse": {"samples": 0}},
        "signals.sparse.samples: 0 must be greater than or equal",
    ),
    ("sweeps", {"kdd": {}}, "sweeps: unknown name `kdd`; did you mean `kd`?"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=[f"{path}-{i}" for i, (path, *_) in enumerate(BAD)])
def test_bad_value_is_one_clear_line(
    load: Callable[..., Experiment], tmp_path: Path, path: str, value: Any, message: str
) -> None:
    settings = minimal()
    change(settings, path, value)
    with pytest.raises(ConfigError) as caught:
        load(settings)
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(f"{tmp_path / 'x.yaml'}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("patch", "problem"),
    [
        ({"divergence": "reverse_kl"}, "divergence: reverse_kl needs the teacher's whole distribution"),
        ({"divergence": {"name": "jsd", "beta": 0.0}}, "divergence: jsd needs the teacher's whole distribution"),
        ({"temperature": {}}, "temperature: base 1 with c 0.5 needs the teacher's whole distribution"),
        ({"temperature": {"base": 2.0, "c": 0}}, "temperature: base 2 with c 0 needs the teacher's whole distribution"),
        ({"temperature": {"base": 1.0, "c": 0}}, ""),
        ({"curriculum": {}, "features": {}, "ce": {}}, ""),
        ({"divergence": None, "ce": {}}, ""),
    ],
)
def test_sparse_signals_serve_forward_kl_at_temperature_1_alone(
    load: Callable[..., Experiment], patch: dict[str, Any], problem: str
) -> None:
    settings = minimal()
    settings["arms"] = {"kd": {"role": "factorial"}, "x": patch}
    assert load(settings).signals.sparse is None  # mode hidden serves all of them
    settings["signals"] = {"mode": "sparse"}
    if not problem:
        assert load(settings).signals.sparse.top_k == 32
        return
    with pytest.raises(ConfigError) as caught:
        load(settings)
    (found,) = caught.value.problems
    assert found.startswith(f"arms.x.{problem}")
    assert "set `signals.mode: hidden`" in found


def test_all_problems_at_once(load: Callable[..., Experiment]) -> None:
    settings = minimal()
    change(settings, "training/lr", 0)
    change(settings, "seeds", [])
    change(settings, "arms/kd/role", "x")
    with pytest.raises(ConfigError) as caught:
        load(settings)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["training.lr", "arms.kd.role", "seeds"]


def test_keys_that_are_missing_have_a_line_each(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: mine\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_experiment(tmp_path / "x.yaml")
    missing = ("data", "training", "method", "arms", "suites")
    lines = str(caught.value).splitlines()
    assert [f"x.yaml: `{key}` is missing." in line for key, line in zip(missing, lines, strict=True)] == [True] * 5


def test_minimal_experiment_is_complete(load: Callable[..., Experiment]) -> None:
    experiment = load(minimal())
    assert experiment.results == "results"
    assert experiment.resolved_arms["full"].method.curriculum.kappa == 0.8
    assert load(minimal() | {"name": "mine"}).results == "results/mine"


def test_overrides_merge_and_read_yaml(load: Callable[..., Experiment]) -> None:
    sft = {"divergence": "null", "ce": {}}
    overrides = {
        "seeds": ["5"],
        "training": {"lr": "1e-4", "clip": "null"},
        "arms": {"sft": sft},
    }
    experiment = load(minimal(), overrides)
    assert experiment.seeds == (5,)
    assert (experiment.training.lr, experiment.training.clip, experiment.training.steps) == (1e-4, None, 2)
    assert list(experiment.resolved_arms) == ["kd", "full", "sft"]
    method = experiment.resolved_arms["sft"].method
    assert (method.divergence, method.ce) == (None, CrossEntropy())
    with pytest.raises(ConfigError, match="unknown key `sedes`; did you mean `seeds`"):
        load(minimal(), {"sedes": [1]})


def test_yaml_words_and_numbers_mean_what_they_look_like(tmp_path: Path) -> None:
    text = yaml.safe_dump(minimal()) + "runtime: {gpus: 0}\nstudent: {layers: [0, 1, 2]}\n"
    text = text.replace("steps: 2", "steps: 2\n  lr: 5e-4").replace("curriculum: {}", "temperature: {t2: off}")
    file = tmp_path / "x.yaml"
    file.write_text(text, encoding="utf-8")
    experiment = load_experiment(file)
    assert experiment.training.lr == 5e-4
    assert experiment.resolved_arms["full"].method.temperature.t2 == "off"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: `a` is already given on line 1; one of them would be lost"),
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "an experiment is a mapping of settings"),
        ("", "an experiment is a mapping of settings"),
        ("a:\n\tb: 1\n", r"not valid YAML: (?!.*unicode string).* line 2, column 1"),
        ("[a, b]: {}\n", "not valid YAML: .* found unhashable key line 1"),
        ("a: " + "[" * 3000, "nested too deeply"),
    ],
)
def test_files_that_are_no_experiment(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_experiment(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="no such experiment file"):
        load_experiment(tmp_path / "y.yaml")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_files_in_another_encoding_are_named_as_such(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "x.yaml").write_bytes("name: café\n".encode(encoding))
    with pytest.raises(ConfigError, match=r"x\.yaml: not in UTF-8 \(byte \d+: .*\); save it as UTF-8"):
        load_experiment(tmp_path / "x.yaml")


def test_arms_may_share_settings_by_yaml_merge_keys(tmp_path: Path) -> None:
    arms = "arms:\n  kd: &kd {}\n  hot: &hot { temperature: { base: 2.0, c: 0 } }\n"
    arms += "  hot_jsd: { <<: *hot, divergence: jsd }\n"
    settings = {key: value for key, value in minimal().items() if key != "arms"}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(settings) + arms, encoding="utf-8")
    method = load_experiment(tmp_path / "x.yaml").resolved_arms["hot_jsd"].method
    assert (method.divergence.name, method.temperature.base) == ("jsd", 2.0)


@pytest.mark.parametrize("file", sorted(ROOT.glob("config/**/*.yaml")), ids=lambda file: file.stem)
def test_shipped_experiments_are_valid(file: Path) -> None:
    experiment = load_experiment(file)
    assert experiment.name == ("demo" if file.name == "config.yaml" else file.stem)


def test_demo_is_what_the_documentation_says() -> None:
    demo = load_experiment(ROOT / "config/config.yaml")
    arms = demo.resolved_arms
    factorial = [arm for arm in arms.values() if arm.role == "factorial"]
    cells = {tuple(getattr(arm.method, name) is not None for name in COMPONENTS) for arm in factorial}
    assert (len(arms), len(demo.seeds), len(factorial), len(cells)) == (12, 3, 8, 8)
    assert arms["full"].method.temperature.c == 0.5
    assert {"sft", "seqkd", "kd", "full", "reverse_kl", "reverse_kl_full"} <= set(arms)
    assert demo.training.steps >= 40
