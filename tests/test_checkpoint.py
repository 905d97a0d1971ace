"""Resume state: atomic, tied to its experiment, and signals noted."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from entkd.checkpoint import ResumeFolder, StopRequest


def test_state_round_trip(tmp_path: Path) -> None:
    resume = ResumeFolder(tmp_path, "a")
    with resume.lock():
        assert resume.load() is None
        resume.save({"step": 3, "weights": torch.arange(4.0), "metrics": "[]"})
        state = ResumeFolder(tmp_path, "a").load()
    assert state is not None
    assert state["step"] == 3
    assert torch.equal(state["weights"], torch.arange(4.0))


def test_a_kill_inside_the_write_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resume = ResumeFolder(tmp_path, "a")
    with resume.lock():
        resume.save({"step": 1})

        def killed(state: object, stream: object) -> None:
            stream.write(b"half")  # type: ignore[attr-defined]
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            resume.save({"step": 2})
        state = resume.load()
        assert state is not None
        assert state["step"] == 1
        assert sorted(path.name for path in resume.folder.iterdir()) == ["lock", "state.pt"]


def test_state_of_another_experiment_is_not_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ResumeFolder(tmp_path, "a").lock():
        ResumeFolder(tmp_path, "a").save({"step": 1})
        assert ResumeFolder(tmp_path, "b").load() is None
        assert "starting anew" in capsys.readouterr().err
        assert ResumeFolder(tmp_path, "a").load() is None  # removed for good


def test_best_weights_with_tied_parameters(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        model[1].weight = model[0].weight
        return model

    resume, model, other = ResumeFolder(tmp_path, "a"), tied(), tied()
    with resume.lock():
        resume.save_best(model, 2)
        resume.save_best(other, 4)
        resume.prune_best(2)
        assert [path.name for path in resume.folder.glob("best-*")] == ["best-2.safetensors"]
        resume.load_best(other, 2)
    assert torch.equal(other[0].weight, model[0].weight)


def test_second_process_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []
    first, second = ResumeFolder(tmp_path, "a"), ResumeFolder(tmp_path, "a")

    def wait() -> None:
        with second.lock():
            order.append("second")
            assert second.folder.exists()  # the first one removed it when it finished

    with first.lock():
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.2)
        order.append("first")
        first.remove()
    thread.join(5)
    assert order == ["first", "second"]


def test_signals_are_noted_and_handlers_restored() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (request.save, request.stop) == (True, False)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (request.save, request.stop) == (True, True)
    assert signal.getsignal(signal.SIGUSR1) is before
