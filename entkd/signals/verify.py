"""Check a signal store: checksums, and a sample of documents computed anew.

Shape suffixes: L tokens of a document, N response tokens of it, E width, U tokens of the vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
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

ENTROPY, TARGET = "error of the entropy", "error of log p(target)"
KL, STATES = "KL(exact ‖ stored)", "KL(exact ‖ of stored states)"
TV, FEATURES = "½ Σ|p − stored p| over the most probable", "relative error of feature layers"
LIMITS = {ENTROPY: 0.1, TARGET: 0.1, KL: 0.01, STATES: 0.01, TV: math.sqrt(0.01 / 2), FEATURES: 0.2}
"""Means, in nats but for the last two, beyond which stored rows are taken for those of other tokens or of another
teacher. Rounding to bf16, of the stored states and of a bf16 trunk, stays far below. Sparse targets have no KL: their
total variation is by Pinsker's inequality at most √(KL/2)."""


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
        0, or 1 where a file's checksum differs, or a mean error of a split exceeds its one of `LIMITS`.

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
                unit = "" if name in (TV, FEATURES) else " nats"
                print(
                    f"{split}: {name}: max {values.max():.3g}, mean {values.mean():.3g}{unit} over {len(values)} tokens"
                )
                if not bool(values.mean() <= LIMITS[name]):
                    failed = True
                    print(
                        f"{split}: mean of {name} above {LIMITS[name]:.2g}: this is not what this teacher says of "
                        f"these tokens; delete {store.folder}"
                    )
    return int(failed)


@dataclass(frozen=True)
class Answer:
    """What a model says of the response tokens of a document."""

    hidden_NE: Tensor
    log_p_NU: Tensor
    layers: dict[int, Tensor]
    """(N, E) outputs of those that were asked for."""


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

    def answer(self, ids_L: Tensor, prompt_length: int, layers: Sequence[int] = ()) -> Answer:
        """Of one document."""
        at_1L = torch.arange(len(ids_L), device=self.device)[None]
        hidden_BLE, captured = trunk_forward(self._model, ids_L[None], at_1L, layers)
        answers = slice(prompt_length - 1, -1)
        hidden_NE = hidden_BLE[0, answers].float()
        log_p_NU = torch.log_softmax(hidden_NE @ self.head_UE.T, dim=1)
        return Answer(hidden_NE, log_p_NU, {layer: states[0, answers].float() for layer, states in captured.items()})


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
        has_N = signals.has_features(tokens)
        exact = teacher.answer(ids_L, prompt_length, store.feature_layers if has_N.any() else ())
        entropy_N = torch.special.entr(exact.log_p_NU.exp()).sum(1).cpu()
        target_N = exact.log_p_NU.gather(1, ids_L[prompt_length:, None])[:, 0].cpu()
        found = {
            ENTROPY: signals.entropy_R[tokens] - entropy_N,
            TARGET: signals.target_logprob_R[tokens] - target_N,
        }
        for layer, states_NE in exact.layers.items():
            exact_NE, stored_NE = states_NE[has_N].cpu(), signals.features(tokens[has_N.numpy()], layer).float()
            error_N = (stored_NE - exact_NE).norm(dim=1) / exact_NE.norm(dim=1).clamp_min(1e-6)
            found[FEATURES] = torch.cat([found.get(FEATURES, error_N[:0]), error_N])
        if bias is None:
            if store.has_logprobs:
                found[KL] = _kl(exact.log_p_NU, signals.logprobs(tokens).to(teacher.device).float())
            # Beside log-probabilities the states are read, too, by divergences that have them not.
            logits_NU = signals.hidden(tokens).to(teacher.device).float() @ store.head_UE.to(teacher.device).float().T
            found[STATES if store.has_logprobs else KL] = _kl(exact.log_p_NU, torch.log_softmax(logits_NU, dim=1))
        else:
            target = signals.sparse(tokens).to(teacher.device)
            mass_NK, ids_NK = target.mass_NK[:, : sparse["top_k"]], target.ids_NK[:, : sparse["top_k"]].long()
            p_NK = exact.log_p_NU.gather(1, ids_NK).exp().masked_fill(mass_NK == 0, 0.0)
            found[TV] = ((mass_NK - p_NK).abs().sum(1) / 2).cpu()
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


def _kl(log_p_NU: Tensor, stored_NU: Tensor) -> Tensor:
    """KL of the exact distributions to those that the store gives, (N,) nats."""
    return (log_p_NU.exp() * (log_p_NU - stored_NU)).nan_to_num().sum(1).cpu()
