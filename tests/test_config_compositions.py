"""What cannot go together is refused before anything runs, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from entkd.config import Experiment
from entkd.config.errors import ProblemsError

DEMO = Path(__file__).parents[1] / "config/config.yaml"


def refused(changes: dict[str, Any], arm: dict[str, Any]) -> str:
    demo = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    with pytest.raises((ValueError, ProblemsError)) as caught:
        Experiment.model_validate(demo | changes | {"arms": {"kd": {}, "new": arm}})
    return str(caught.value)


def test_a_budget_needs_lengths_that_on_policy_text_has_not() -> None:
    demo = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    training = {key: value for key, value in demo["training"].items() if key != "steps"} | {"budget": {"tokens": 9000}}
    message = refused({"training": training}, {"pipeline": "onpolicy", "on_policy": "gkd"})
    assert "arms.new.on_policy: what the student will write is not known" in message


def test_other_difficulties_are_not_known_of_on_policy_text() -> None:
    signals = {"features": None}
    arm = {"pipeline": "onpolicy", "on_policy": "gkd", "curriculum": {}, "difficulty": {"source": "unigram"}}
    message = refused({"signals": signals}, arm)
    assert "arms.new.difficulty.source: unigram is not known of text that the student writes" in message


def test_an_approach_in_sparse_signals() -> None:
    message = refused({"signals": {"mode": "sparse", "features": None}}, {"approach": "taid"})
    assert "arms.new.approach: taid needs the teacher's whole distribution" in message
    arms = {"kd": {}, "new": {"approach": "sekd"}}
    demo = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    Experiment.model_validate(demo | {"signals": {"mode": "sparse", "features": None}, "arms": arms})
