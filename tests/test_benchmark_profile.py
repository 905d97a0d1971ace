"""The benchmark that says where the time of a step goes."""

from __future__ import annotations

import csv

import torch
from torch import nn

from benchmarks import profile
from benchmarks.inputs import MODES
from benchmarks.trainers import Trainer


class Known(Trainer):
    """A step of a linear layer, a norm and an optimizer."""

    def __init__(self) -> None:
        self.layer = nn.Linear(256, 512, bias=False)
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), fused=True)
        self.steps_made: list[int] = []

    def backward(self, number):
        raise NotImplementedError

    def step(self, number):
        self.steps_made.append(number)
        torch.linalg.vector_norm(self.layer(torch.randn(64, 256)) + 1).backward()
        self.optimizer.step()


def test_every_operation_is_of_one_part():
    known = Known()
    found = profile.parts(known, 3)
    assert known.steps_made == [0, 1, 2, 3]  # one that is not counted
    assert {"linear layers", "AdamW", "norm of the gradient", profile.REST} <= set(found)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert "attention" not in found


def test_what_an_operation_calls_is_part_of_it():
    class _TiledLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return (x @ x.T).sum()

        @staticmethod
        def backward(ctx, gradient):
            return torch.eye(300) @ torch.eye(300)

    class Inside(Known):
        def step(self, number):
            _TiledLoss.apply(torch.randn(300, 300, requires_grad=True)).backward()

    found = profile.parts(Inside(), 2)
    assert "linear layers" not in found
    assert found["output projections and loss"] > 0


def test_table(tmp_path, tiny_inputs, monkeypatch):
    monkeypatch.setattr(profile, "prepare_inputs", lambda *_: tiny_inputs)
    assert profile.main(["--rounds", "1", "--precision", "fp32", "--output", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "profile.csv").open(encoding="utf-8")))
    assert {"linear layers", "attention", "output projections and loss", "AdamW"} <= {row["part"] for row in rows}
    for mode in MODES:
        assert abs(sum(float(row[f"{mode}_share"]) for row in rows) - 1) < 0.01
