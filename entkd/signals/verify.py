"""Check a signal store: checksums, and a sample of documents computed anew.

Shape suffixes: L tokens of a document, N response tokens of it, E width, U tokens of the vocabulary.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from entkd.config import Signals
from entkd.data import Corpus
from entkd.errors import UserError
from entkd.files import file_sha256
from entkd.models import load_model, output_weight, trunk_forward, vocab_rows
from entkd.runtime import device_slot, numpy_stream
from entkd.signals.bias import BiasReport, perturbed
from entkd.signals.content import content_key, describe_content
from entkd.signals.split import SplitSignals
from entkd.signals.store import SignalStore

KL_LIMIT = 0.01
"""Mean KL in nats beyond which stored rows are taken for those of other tokens or of another teacher. Rounding to
bf16, of the stored states and of a bf16 trunk, stays far below."""
TV_LIMIT = math.sqrt(KL_LIMIT / 2)
"""The same for sparse targets, which have no such KL: mean total variation over the most probable tokens, which by
Pinsker's inequality is at most √(KL/2)."""

KL, TV, MASS = "KL(exact ‖ stored)", "½ Σ|p − stored p| over the most probable", "error of the sum of masses"


def verify(signals: Path, teacher: Path, data: Path, sample: int, student: Path | None = None) -> int:
    """Print what differs between the store and an fp32 teacher run on unpacked documents.

    Of sparse targets it also prints how much bias and noise they have (`entkd.signals.bias`); the rounding of a bf16
    trunk counts as error there.

    Parameters
    ----------
    signals
        Manifest of the signals stage.
    teacher, data
        The folders that the store was made from.
    sample
        Documents of each split to compute anew.
    student
        A model for which the bias of sparse targets is measured, beside noisy copies of the teacher.

    Returns
    -------
    int
        0, or 1 where a file's checksum differs, or the mean KL(exact ‖ stored) of a split exceeds `KL_LIMIT`, or for
        sparse targets the total variation `TV_LIMIT`.

    Raises
    ------
    UserError
        If the store was made from another teacher or other data.
    """
    store = SignalStore.open(signals)
    _refuse_other_content(store, teacher, data)
    damaged = [
        name
        for name, entry in store.manifest["files"].items()
        if not (store.folder / name).is_file() or file_sha256(store.folder / name) != entry["sha256"]
    ]
    for name in damaged:
        print(f"{store.folder / name}: checksum differs from the manifest's; delete the file and run `entkd signals`")
    if damaged:
        return 1
    print(f"{store.folder}: {len(store.manifest['files'])} checksums agree")
    failed = False
    with device_slot() as device:
        exact = Recomputed(teacher, store.vocab_size, device)
        other = None if student is None else Recomputed(student, store.vocab_size, device)
        for split in store.manifest["splits"]:
            errors = _compare(store, store.split(split), Corpus.open(data, split), exact, other, sample)
            for name, values in errors.items():
                unit = "" if name in (TV, MASS) else " nats"
                print(
                    f"{split}: {name}: max {values.max():.3g}, mean {values.mean():.3g}{unit} over {len(values)} tokens"
                )
            measure, limit = (TV, TV_LIMIT) if TV in errors else (KL, KL_LIMIT)
            if not bool(errors[measure].mean() <= limit):
                failed = True
                print(
                    f"{split}: mean of {measure} above {limit:.2g}: these are not this teacher's distributions; delete "
                    f"{store.folder}"
                )
    return int(failed)


@dataclass(frozen=True)
class Answer:
    """What a model says of the response tokens of a document."""

    hidden_NE: Tensor
    log_p_NU: Tensor


class Recomputed:
    """A model in fp32 on unpacked documents.

    Raises UserError if its head has fewer rows than the vocabulary has tokens.
    """

    def __init__(self, folder: Path, vocab_size: int, device: torch.device) -> None:
        self._model: PreTrainedModel = load_model(folder, torch.float32)
        vocab_rows(output_weight(self._model), vocab_size, f"model {folder}")
        self._model.to(device)  # type: ignore[arg-type]  # Transformers' annotation
        self.device = device
        self.head_UE = output_weight(self._model)[:vocab_size].detach().float()

    def answer(self, ids_L: Tensor, prompt_length: int) -> Answer:
        """Of one document."""
        hidden_BLE, _ = trunk_forward(self._model, ids_L[None], torch.arange(len(ids_L), device=self.device)[None])
        hidden_NE = hidden_BLE[0, prompt_length - 1 : -1].float()
        return Answer(hidden_NE, torch.log_softmax(hidden_NE @ self.head_UE.T, dim=1))


def _refuse_other_content(store: SignalStore, teacher: Path, data: Path) -> None:
    content = store.manifest["content"]
    dtype = getattr(torch, content["precision"])
    given = describe_content(Signals.model_validate(content["settings"]), content["needs"], teacher, data, dtype)
    if content_key(given) != store.manifest["key"]:
        differing = [name for name in content if content[name] != given[name]]
        raise UserError(
            f"{store.folder}: made from other inputs than {teacher} and {data}: {', '.join(differing)} differ"
        )


@torch.inference_mode()
def _compare(
    store: SignalStore,
    signals: SplitSignals,
    corpus: Corpus,
    teacher: Recomputed,
    student: Recomputed | None,
    sample: int,
) -> dict[str, Tensor]:
    """Absolute errors of a sample of documents, one value per response token. Prints the bias of sparse targets."""
    errors: dict[str, list[Tensor]] = {}
    sparse = store.manifest["content"]["settings"].get("sparse")
    bias = BiasReport(**sparse) if signals.is_sparse else None
    for document in np.sort(numpy_stream(0, "verify").permutation(len(corpus))[:sample]).tolist():
        ids, prompt_length = corpus.document(document)
        ids_L = torch.from_numpy(ids.astype(np.int64)).to(teacher.device)
        tokens = np.arange(corpus.response_offsets[document], corpus.response_offsets[document + 1])
        exact = teacher.answer(ids_L, prompt_length)
        entropy_N = torch.special.entr(exact.log_p_NU.exp()).sum(1).cpu()
        target_N = exact.log_p_NU.gather(1, ids_L[prompt_length:, None])[:, 0].cpu()
        found = {
            "error of the entropy": signals.entropy_R[tokens] - entropy_N,
            "error of log p(target)": signals.target_logprob_R[tokens] - target_N,
        }
        if bias is None:
            found[KL] = _kl(store, signals, tokens, exact.log_p_NU)
        else:
            target = signals.sparse(tokens).to(teacher.device)
            mass_NK, ids_NK = target.mass_NK[:, : sparse["top_k"]], target.ids_NK[:, : sparse["top_k"]].long()
            p_NK = exact.log_p_NU.gather(1, ids_NK).exp().masked_fill(mass_NK == 0, 0.0)
            found[TV] = ((mass_NK - p_NK).abs().sum(1) / 2).cpu()
            found[MASS] = (target.mass_NK.sum(1) - 1).cpu()
            students = perturbed(exact.hidden_NE, teacher.head_UE, exact.log_p_NU, document)
            if student is not None:
                given = student.answer(ids_L, prompt_length).log_p_NU
                students = itertools.chain(students, [("the student", given)])
            bias.add(exact.log_p_NU, target, students)
        for name, values in found.items():
            errors.setdefault(name, []).append(values.abs())
    for line in bias.lines() if bias is not None else ():
        print(f"{signals.name}: {line}")
    return {name: torch.cat(parts) for name, parts in errors.items()}


def _kl(store: SignalStore, signals: SplitSignals, tokens: NDArray[np.int64], log_p_NU: Tensor) -> Tensor:
    """KL of the exact distributions to those that the store gives, (N,) nats."""
    device = log_p_NU.device
    if store.has_logprobs:
        stored_NU = signals.logprobs(tokens).to(device).float()
    else:
        head_UE = store.head_UE.to(device).float()
        stored_NU = torch.log_softmax(signals.hidden(tokens).to(device).float() @ head_UE.T, dim=1)
    return (log_p_NU.exp() * (log_p_NU - stored_NU)).nan_to_num().sum(1).cpu()
