from __future__ import annotations

import torch
from tiny_models import tiny_llama
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

from entkd.cache import growing_cache


def test_cache_grows_in_place_and_holds_what_transformers_cache_does() -> None:
    model = tiny_llama()
    cache, expected = growing_cache(model), DynamicCache(config=model.config)
    states = torch.Generator().manual_seed(0)
    addresses = set()
    for step in range(150):
        tokens = 5 if step == 0 else 1
        rows = 6 if step <= 100 else 3
        new = torch.randn(2, rows, 2, tokens, 8, generator=states)
        held = cache.update(new[0], new[1], 0)
        assert all(
            torch.equal(own, theirs) for own, theirs in zip(held, expected.update(new[0], new[1], 0), strict=True)
        )
        addresses.add(held[0].data_ptr())
        if step == 100:
            for each in (cache, expected):
                each.batch_select_indices(torch.tensor([4, 1, 3]))
        if step == 120:
            for each in (cache, expected):
                each.crop(-4)
    assert cache.get_seq_length() == expected.get_seq_length() == 150
    assert len(addresses) <= 4


def test_buffers_of_rows_that_left_are_freed_at_once() -> None:
    cache = growing_cache(tiny_llama())
    cache.update(torch.ones(64, 2, 100, 8), torch.ones(64, 2, 100, 8), 0)
    cache.batch_select_indices(torch.tensor([3, 5]))
    layer = cache.layers[0]
    held = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in vars(layer).values()
        if torch.is_tensor(each)
    }
    assert sum(held.values()) == 2 * 2 * 2 * 100 * 8 * 4


def test_inherited_methods_that_copy_are_followed() -> None:
    cache, expected = growing_cache(tiny_llama()), DynamicCache(config=tiny_llama().config)
    for each in (cache, expected):
        states = torch.Generator().manual_seed(0)
        each.update(*torch.randn(2, 3, 2, 4, 8, generator=states), 0)
        each.reorder_cache(torch.tensor([2, 0, 1]))
        each.update(*torch.randn(2, 3, 2, 1, 8, generator=states), 0)
        each.batch_repeat_interleave(2)
    new = torch.ones(6, 2, 1, 8)
    for own, theirs in zip(cache.update(new, new, 0), expected.update(new, new, 0), strict=True):
        assert torch.equal(own, theirs)


def test_sliding_layers_stay_as_they_are() -> None:
    config = Gemma3TextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    layers = growing_cache(Gemma3ForCausalLM(config)).layers
    assert type(layers[0]) is type(DynamicCache(config=config).layers[0])
    assert type(layers[1]) is not type(DynamicCache(config=config).layers[1])
