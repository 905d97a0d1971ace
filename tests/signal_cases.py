"""Settings, teachers and reference values for the tests of the signal store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from entkd.config import Signals
from entkd.models.teacher import write_manifest

SETTINGS = Signals(calibration_tokens=150, shard_tokens=120, batch_tokens=96)
HARD = {"features": {"points": 3, "tokens": "hard", "threshold": 0.8}, "splits": ["train", "test"]}
ALL = {"features": {"points": 2, "tokens": "all", "threshold": 0.8}, "splits": ["train"]}


def as_teacher(model: LlamaForCausalLM, tokenizer: Path, folder: Path) -> Path:
    """A prepared teacher folder: model/ and manifest.json."""
    model.save_pretrained(folder / "model")
    PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(folder / "model")
    shutil.copy(tokenizer / "tokenizer.json", folder / "model")
    write_manifest(folder, {"source": "test"})
    return folder


def direct(teacher: Path, data: Path, split: str) -> dict[str, np.ndarray]:
    """Signals by the model's own logits and layer outputs in fp64, one unpacked document at a time."""
    model = LlamaForCausalLM.from_pretrained(teacher / "model", dtype=torch.float64).eval()
    vocab_size = json.loads((data / "manifest.json").read_text())["vocab_size"]
    outputs: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _m, _a, out, index=index: outputs.__setitem__(index, out))
    found: dict[str, list[torch.Tensor]] = {}
    ids, offsets, prompts = (np.load(data / f"{split}.{name}.npy") for name in ("ids", "offsets", "prompt_lengths"))
    for start, stop, prompt in zip(offsets[:-1], offsets[1:], prompts, strict=True):
        document = torch.from_numpy(ids[start:stop].astype(np.int64))
        with torch.no_grad():
            trunk = model.model(input_ids=document[None], use_cache=False).last_hidden_state[0]
            p = torch.softmax((trunk @ model.lm_head.weight.T)[:, :vocab_size], dim=1)
        answer = slice(int(prompt) - 1, len(document) - 1)
        found.setdefault("entropy", []).append(-(p * p.log()).sum(1)[answer])
        found.setdefault("logsumexp", []).append((trunk @ model.lm_head.weight.T)[:, :vocab_size].logsumexp(1)[answer])
        found.setdefault("target", []).append(p.log()[torch.arange(len(document) - 1), document[1:]][int(prompt) - 1 :])
        found.setdefault("hidden", []).append(trunk[answer])
        for index, states in outputs.items():
            found.setdefault(f"layer{index}", []).append(
                (states[0] if isinstance(states, tuple) else states)[0][answer]
            )
    return {name: torch.cat(parts).detach().numpy() for name, parts in found.items()}


def tree(folder: Path) -> dict[str, bytes]:
    """Every safetensors file of a store."""
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}
