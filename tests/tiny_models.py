"""Tiny random models for the tests."""

from __future__ import annotations

from collections import Counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(vocab_size: int = 300, seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A random Llama: 4 layers, width 32, tied embeddings."""
    settings: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    } | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def ending_early(prompts: list[list[int]], seed: int = 3) -> LlamaForCausalLM:
    """A tiny Llama whose greedy continuations of ``prompts`` often reach EOS (id 2), at different steps.

    The token that most continuations of a random model contain changes places with EOS.
    """
    model = tiny_llama(seed=seed)
    found: Counter[int] = Counter()
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=None)
        found.update(set(ids[0, len(prompt) + 1 :].tolist()))
    common = found.most_common(1)[0][0]
    weight_VD = model.model.embed_tokens.weight
    with torch.no_grad():
        weight_VD[[2, common]] = weight_VD[[common, 2]]
    return model
