"""When a step trains on what the student writes: GKD and DistiLLM by hand, and where the settings refuse them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from references import schedules

from entkd.config import Experiment, Method, jobs
from entkd.config.errors import ConfigError
from entkd.config.load import load_experiment
from entkd.methods.distillm import DistiLLM
from entkd.methods.gkd import GKD


def test_gkd_writes_in_its_share_of_the_steps() -> None:
    draws = np.random.default_rng(0).random(20_000)
    for share in (0.0, 0.25, 1.0):
        written = np.mean([GKD(share=share).writes(draw) for draw in draws])
        assert written == pytest.approx(share, abs=0 if share in (0, 1) else 0.01)


# φ = 0.4 at t/T = 0.25: λ_R = 0.3 (decreasing), 0.2 (constant), 0.1 (increasing)
@pytest.mark.parametrize(("replay", "newly"), [("decreasing", 0.3), ("constant", 0.2), ("increasing", 0.1)])
@pytest.mark.parametrize("variant", ["authors", "paper"])
def test_distillm_divides_the_steps_between_new_text_the_buffer_and_the_data(
    replay: str, newly: float, variant: str
) -> None:
    settings = DistiLLM(replay=replay, variant=variant, capacity=10)
    for below, above, kinds in ((newly, newly, ("written", "replayed")), (0.4, 0.4, ("replayed", "data"))):
        found = [settings.source(draw, 0.4, 0.25, 10, 4) for draw in (below - 1e-9, above + 1e-9)]
        assert tuple(found) == kinds


def test_distillm_writes_until_its_buffer_can_serve() -> None:
    """The release waits for a full buffer, the paper's algorithm for as many documents as a step needs."""
    released, paper = DistiLLM(capacity=10), DistiLLM(capacity=10, variant="paper")
    late = (0.35, 0.4, 1.0)  # λ_R is 0 at the last step
    assert [released.source(*late, held, 4) for held in (0, 9, 10)] == ["written", "written", "replayed"]
    assert [paper.source(*late, held, 4) for held in (3, 4, 9)] == ["written", "replayed", "replayed"]
    assert released.source(0.45, 0.4, 1.0, 0, 4) == "data"


DRAWS = (0.1, 0.28, 0.22, 0.9, 0.35, 0.05, 0.28, 0.6, 0.45, 0.02)
LOSSES = (3.0, 3.05, 3.12, 2.9, 3.1, 3.25)
"""Dev losses before the first step and after every second one."""
GOLDEN = {("gkd", 1): "wwwdwwwdww", ("distillm", 1): "wwrdrwrdrr", ("distillm_paper", 1): "wrrddwrdrr"}
"""What ten steps train on, by version, worked out by hand: written anew, replayed from the buffer, data."""


def kinds_by_reference(row: str) -> str:
    if row == "gkd":
        return "".join({"student": "w", "data": "d"}[schedules.gkd_source(draw, 0.5)] for draw in DRAWS)
    variant, kinds = "paper" if row.endswith("paper") else "authors", ""
    thresholds = schedules.distillm_thresholds(LOSSES, increase=0.2, initial=0.3, variant=variant)
    for step, draw in enumerate(DRAWS, start=1):
        threshold, full = thresholds[(step - 1) // 2], kinds.count("w") >= 2
        fresh = schedules.distillm_fresh(threshold, step, len(DRAWS))
        generates, source = schedules.distillm_source(draw, threshold, fresh, full, variant)
        kinds += "w" if generates else {"buffer": "r", "data": "d"}[source]
    return kinds


@pytest.mark.parametrize("row", ["gkd", "distillm", "distillm_paper"])
def test_ten_steps_by_hand_and_by_the_reference(row: str, evidence) -> None:
    """A step has two documents, the buffer four; φ begins at 0.3."""
    variant, share, reference, kinds = "paper" if row.endswith("paper") else "authors", 0.3, LOSSES[0], ""
    settings = GKD() if row == "gkd" else DistiLLM(variant=variant, share=share, share_step=0.2, capacity=4)
    for step, draw in enumerate(DRAWS, start=1):
        if isinstance(settings, GKD):
            kinds += "w" if settings.writes(draw) else "d"
            continue
        held = min(4, 2 * kinds.count("w"))
        kinds += settings.source(draw, share, step / len(DRAWS), held, 2)[0]
        if step % 2 == 0:
            share, reference = settings.evaluated(LOSSES[step // 2], share, reference)
    assert kinds == GOLDEN[row, settings.version] == kinds_by_reference(row)
    evidence(row, "golden", f"`{kinds}`")


def test_share_rises_with_the_dev_loss() -> None:
    """Losses 3, 3.05, 3.12, 2.9, 3.1 after a reference of 3, tolerance 0.1: worked out by hand."""
    losses = (3.0, 3.05, 3.12, 2.9, 3.1, 3.25)
    rises = {"authors": [0, 0, 1, 1, 1, 2], "paper": [0, 0, 0, 0, 1, 2]}
    for variant, expected in rises.items():
        settings, share, reference = DistiLLM(variant=variant, share=0.2, share_step=0.25), 0.2, 3.0
        for loss, rise in zip(losses, expected, strict=True):
            share, reference = settings.evaluated(loss, share, reference)
            assert share == pytest.approx(0.2 + 0.25 * rise), (variant, loss)
    settings = DistiLLM(share_step=0.7)
    assert settings.evaluated(9.0, 0.6, 1.0) == (1.0, 9.0)  # at most 1
    # exactly at the tolerance the release rises, the paper's algorithm does not
    assert DistiLLM(loss_tolerance=0.5).evaluated(1.5, 0.0, 1.0)[0] == pytest.approx(0.1)
    assert DistiLLM(loss_tolerance=0.5, variant="paper").evaluated(1.5, 0.0, 1.0)[0] == 0.0


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"on_policy": "gkd", "ce": {}}, "on_policy: gkd has the teacher judge what the student writes, by a div"),
        ({"on_policy": "gkd", "divergence": "jsd", "ce": {}}, "ce would teach the student the text that it wrote"),
        ({"on_policy": {"name": "gkd", "share": 1.5}, "divergence": "jsd"}, "less than or equal to 1"),
        ({"on_policy": {"name": "distillm", "beta": 1}, "divergence": "jsd"}, "Extra inputs"),
    ],
)
def test_methods_that_make_no_sense_are_refused(method: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method.model_validate(method)


def experiment(folder: Path, arms: dict[str, object], signals: dict[str, object] | None = None) -> Experiment:
    """The demo with other arms, loaded from a file."""
    settings = yaml.safe_load((Path(__file__).parents[1] / "config/config.yaml").read_text(encoding="utf-8"))
    settings |= {"arms": {"kd": {}, **arms}, "analysis": {"reference": "kd"}, "signals": signals or {}}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return load_experiment(folder / "experiment.yaml")


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"on_policy": "gkd"}, r"arms\.x\.on_policy: gkd lets the teacher read .* set `pipeline: onpolicy`"),
        ({"on_policy": "gkd", "pipeline": "seqkd"}, r"`pipeline: seqkd` gives the training no teacher"),
        ({"pipeline": "onpolicy"}, r"arms\.x\.pipeline: onpolicy trains on text .* set `on_policy: gkd`"),
        (
            {"pipeline": "onpolicy", "on_policy": "gdk"},
            r"x\.on_policy\.name: unknown name `gdk`; did you mean `gkd`",
        ),
    ],
)
def test_pipeline_and_method_belong_together(tmp_path: Path, arm: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment(tmp_path, {"x": arm})


def test_sparse_signals_are_refused(tmp_path: Path) -> None:
    arm = {"pipeline": "onpolicy", "on_policy": "gkd"}
    with pytest.raises(ConfigError, match=r"arms\.x\.on_policy: gkd meets the teacher's whole distribution"):
        experiment(tmp_path, {"x": arm}, {"mode": "sparse"})


def test_arms_without_student_text_keep_their_parameters(tmp_path: Path) -> None:
    """No present result is retrained by the new key; with it an arm is another experiment, and says so in words."""
    plain = Method.model_validate({"divergence": "jsd"})
    assert "on_policy" not in plain.model_dump(mode="json")
    own = {"pipeline": "onpolicy", "on_policy": {"name": "gkd", "share": 0.3}}
    arms = {"a": own, "b": own | {"on_policy": {"name": "gkd", "share": 0.4}}, "c": own | {"on_policy": "distillm"}}
    loaded = experiment(tmp_path, arms)
    assert "on_policy" not in loaded.resolved_arms["kd"].trained_method
    assert loaded.resolved_arms["a"].trained_method["on_policy"]["share"] == 0.3
    words = {arm["name"]: arm["divergence"] for arm in jobs.analysis_settings(loaded)["arms"]}
    assert words["a"] == "gkd share=0.3: forward_kl"
    assert words["c"] == "distillm: forward_kl"
