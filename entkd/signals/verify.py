"""Check a signal store: checksums, and a sample of documents computed anew.

Shape suffixes: N response tokens of a document, E width, U tokens of the vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from entkd.config import Signals
from entkd.data import Corpus
from entkd.errors import UserError
from entkd.files import file_sha256
from entkd.models import load_model, output_weight, trunk_forward
from entkd.runtime import device_slot, numpy_stream
from entkd.signals.content import content_key, describe_content
from entkd.signals.store import SignalStore, SplitSignals

KL_LIMIT = 0.01
"""Mean KL in nats beyond which stored rows are taken for those of other tokens or of another teacher. Rounding to
bf16, of the stored states and of a bf16 trunk, stays far below."""


def verify(signals: Path, teacher: Path, data: Path, sample: int) -> int:
    """Print what differs between the store and an fp32 teacher run on unpacked documents.

    Parameters
    ----------
    signals
        Manifest of the signals stage.
    teacher, data
        The folders that the store was made from.
    sample
        Documents of each split to compute anew.

    Returns
    -------
    int
        0, or 1 where a file's checksum differs, or the mean KL(exact ‖ stored) of a split exceeds `KL_LIMIT`.

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
        model = load_model(teacher, torch.float32)
        model.to(device)  # type: ignore[arg-type]  # Transformers' annotation
        for split in store.manifest["splits"]:
            errors = _compare(store, store.split(split), Corpus.open(data, split), model, sample, device)
            for name, values in errors.items():
                print(
                    f"{split}: {name}: max {values.max():.3g}, mean {values.mean():.3g} nats over {len(values)} tokens"
                )
            failed |= not bool(errors["KL(exact ‖ stored)"].mean() <= KL_LIMIT)
    if failed:
        print(f"mean KL above {KL_LIMIT} nats: these are not this teacher's distributions; delete {store.folder}")
    return int(failed)


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
    store: SignalStore, signals: SplitSignals, corpus: Corpus, model: PreTrainedModel, sample: int, device: torch.device
) -> dict[str, Tensor]:
    """Absolute errors of a sample of documents, one value per response token."""
    head_UE = output_weight(model)[: store.vocab_size].float()
    stored_head_UE = store.head_UE.to(device).float()
    errors: dict[str, list[Tensor]] = {}
    for document in np.sort(numpy_stream(0, "verify").permutation(len(corpus))[:sample]).tolist():
        ids, prompt_length = corpus.document(document)
        ids_L = torch.from_numpy(ids.astype(np.int64)).to(device)
        hidden_BLE, _ = trunk_forward(model, ids_L[None], torch.arange(len(ids), device=device)[None])
        exact_NU = torch.log_softmax(hidden_BLE[0, prompt_length - 1 : -1].float() @ head_UE.T, dim=1)
        tokens = np.arange(corpus.response_offsets[document], corpus.response_offsets[document + 1])
        if store.has_logprobs:
            stored_NU = signals.logprobs(tokens).to(device).float()
        else:
            stored_NU = torch.log_softmax(signals.hidden(tokens).to(device).float() @ stored_head_UE.T, dim=1)
        target_N = exact_NU.gather(1, ids_L[prompt_length:, None])[:, 0].cpu()
        found = {
            "error of the entropy": signals.entropy_R[tokens] - torch.special.entr(exact_NU.exp()).sum(1).cpu(),
            "error of log p(target)": signals.target_logprob_R[tokens] - target_N,
            "KL(exact ‖ stored)": (exact_NU.exp() * (exact_NU - stored_NU)).nan_to_num().sum(1).cpu(),
        }
        for name, values in found.items():
            errors.setdefault(name, []).append(values.abs())
    return {name: torch.cat(parts) for name, parts in errors.items()}
