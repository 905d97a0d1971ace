"""Stopped inside a step and continued: the weights and the log of a run that was not stopped.

Arms without a state of their own; `test_approaches.py` and `test_onpolicy.py` have the others, `test_loop.py` kills.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from entkd.config import DIVERGENCE_NAMES, Method, Training
from entkd.data.seqkd import prepare_seqkd
from entkd.distill import distill, loop

TRAINING = Training(steps=3, block=64, blocks_per_step=2, micro_blocks=1, lr=3e-3, precision="fp32", eval_every=2)
COMPONENTS = {"curriculum": {}, "temperature": {}, "features": {}}
ARMS = {"sft": {"ce": {}}, "seqkd": {"ce": {}}} | {
    name + suffix: {"divergence": name, **components}
    for name in DIVERGENCE_NAMES
    for suffix, components in (("", {}), ("_full", COMPONENTS))
}


@pytest.fixture(scope="module")
def taught(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SeqKD's data: the teacher's responses to the prompts."""
    folder = tmp_path_factory.mktemp("seqkd")
    prepare_seqkd(tiny.teacher, tiny.data, folder, max_response_tokens=12, batch=36, precision="fp32")
    return folder


@pytest.mark.parametrize("arm", ARMS)
def test_it_resumes_bit_for_bit(
    tiny, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str, evidence
) -> None:
    torch.set_num_threads(1)
    method, data = Method.model_validate(ARMS[arm]), taught if arm == "seqkd" else tiny.data
    inputs = (method, TRAINING, 0, tiny.student, data, tiny.signals if method.needs_signals else None)
    original, calls = loop.clip_gradients, 0

    def dies_in_the_third_step(*arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "clip_gradients", dies_in_the_third_step)
        with pytest.raises(KeyboardInterrupt):
            distill(*inputs, tmp_path / "stopped", 1e-9)
    found = []
    for name in ("stopped", "whole"):
        distill(*inputs, tmp_path / name)
        record = json.loads((tmp_path / name / "run.json").read_text(encoding="utf-8"))
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]
        found.append((record["weights_sha256"], rows))
        assert record["resumed"] == (name == "stopped")
    assert found[0] == found[1]
    for row in (arm, "kd") if arm == "forward_kl" else (arm,):
        evidence(row, "resumes", "yes")
