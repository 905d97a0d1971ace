"""A tiny student, its teacher's signals, and an independent fp64 reference of the whole loss."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from entkd.config import Signals, Student
from entkd.data import Corpus
from entkd.models import init_student, load_model
from entkd.signals.write import write_signals


@dataclass(frozen=True)
class Tiny:
    """Folders of a tiny experiment."""

    teacher: Path
    student: Path
    data: Path
    signals: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_corpus: Path) -> Tiny:
    """Teacher of 4 layers, student of its layers 0, 1 and 3, signals with the features of every token."""
    folder = tmp_path_factory.mktemp("tiny")
    teacher = folder / "teacher"
    teacher.mkdir()
    (teacher / "model").symlink_to(tiny_teacher)
    (teacher / "manifest.json").write_text(json.dumps({"sha256": "0" * 64}), encoding="utf-8")
    init_student(Student(layers=(0, 1, 3)), teacher, folder / "student", 0)
    student = folder / "student"
    signals = folder / "signals" / "manifest.json"
    needs = {"features": {"points": 3, "tokens": "all", "threshold": 0.8}, "splits": ["train", "test"]}
    write_signals(Signals(), needs, teacher, tiny_corpus, folder / "cache", signals, "fp32")
    return Tiny(teacher, student, tiny_corpus, signals)


@dataclass(frozen=True)
class ReferenceTerms:
    """The total loss of some documents, term by term, in fp64, and what it was made of."""

    kd: Tensor
    ce: Tensor
    features: Tensor
    positions: int
    difficulty: np.ndarray


def midrank(values: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Mid-rank empirical CDF, by counting."""
    below = (sample[None, :] < values[:, None]).mean(1)
    equal = (sample[None, :] == values[:, None]).mean(1)
    return below + equal / 2


@pytest.fixture(scope="session")
def reference(tiny: Tiny):
    """f(student, documents, kappa, u, c, theta, projectors) → ReferenceTerms: every document alone, dense, fp64.

    Written from docs/method.md with plain tensor operations: no packing, no micro-batches, no tiles, none of the
    package's losses.
    """
    teacher = load_model(tiny.teacher).double()
    corpus = Corpus.open(tiny.data, "train")
    head = teacher.get_output_embeddings().weight.detach()

    def states(model: nn.Module, document: int) -> tuple[Tensor, list[Tensor], Tensor]:
        ids, prompt_length = corpus.document(document)
        ids = torch.as_tensor(ids.astype(np.int64))
        captured: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(
                lambda module, args, out: captured.append(out[0] if isinstance(out, tuple) else out)
            )
            for layer in model.model.layers
        ]
        last = model.model(input_ids=ids[None]).last_hidden_state[0]
        for hook in hooks:
            hook.remove()
        cut = slice(prompt_length - 1, len(ids) - 1)
        return last[cut], [layer[0][cut] for layer in captured], ids[prompt_length:]

    with torch.no_grad():
        taught = [states(teacher, d) for d in range(len(corpus))]
        logprobs = [torch.log_softmax(last @ head.T, -1) for last, _, _ in taught]
        entropy = [-(lp.exp() * lp).sum(-1).numpy() for lp in logprobs]
    calibration = np.concatenate(entropy).astype(np.float32)

    def compute(
        student, documents, kappa=0.0, u=0.5, c=0.0, theta=0.8, projectors=None, reverse=False
    ) -> ReferenceTerms:
        d = midrank(np.concatenate([entropy[i] for i in documents]).astype(np.float32), calibration)
        w = 1 + kappa * (2 * u - 1) * (2 * d - 1)
        w = torch.as_tensor(w / w.mean())
        temperature = torch.as_tensor(np.exp(c * (2 * d - 1)))
        learned = [states(student, i) for i in documents]
        z_s = torch.cat([last for last, _, _ in learned]) @ student.get_output_embeddings().weight.T
        # the store keeps hidden states in bf16: the reference distribution is the one that they give
        z_t = torch.cat([taught[i][0].to(torch.bfloat16).double() for i in documents]) @ head.T
        log_p = torch.log_softmax(z_t / temperature[:, None], -1)
        log_q = torch.log_softmax(z_s / temperature[:, None], -1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1) if reverse else (log_p.exp() * (log_p - log_q)).sum(-1)
        labels = torch.cat([labels for _, _, labels in learned])
        n = len(labels)
        ce = torch.nn.functional.cross_entropy(z_s, labels, reduction="sum")
        hard = torch.as_tensor(d > theta)
        features = torch.zeros((), dtype=torch.float64)
        if projectors is not None:
            for k, (student_layer, teacher_layer) in enumerate(((0, 0), (1, 2), (2, 3))):
                mine = torch.cat([layers[student_layer] for _, layers, _ in learned])[hard] @ projectors[k].T
                theirs = torch.cat([taught[i][1][teacher_layer] for i in documents])[hard].to(torch.bfloat16).double()
                cosine = (mine * theirs).sum(-1) / (mine.norm(dim=-1) * theirs.norm(dim=-1))
                features = features + (1 - cosine).sum()
            features = features / (max(1, int(hard.sum())) * 3)
        return ReferenceTerms((w * temperature**2 * kl).sum() / n, ce / n, features, n, d)

    return compute
