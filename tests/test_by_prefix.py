"""Rows by their distinct prefixes have the states that the plain model gives them one by one."""

from __future__ import annotations

import random

import pytest
import torch
from test_by_document import MODELS, tokens_seen
from tiny_models import tiny_llama

from entkd.models import Prefixes, goes_by_prefix, prefix_states, trunk

TREE = [[5, 6, 7], [5, 6], [5, 8, 7, 9], [4], [5, 6, 7, 7, 7], [8, 7, 9]]
"""Beginnings shared and not; a row that is another's beginning; equal tokens after different ones."""


def random_rows(count: int, longest: int) -> list[list[int]]:
    generator = random.Random(0)
    rows: list[list[int]] = [[1]]
    while len(rows) < count:
        start = generator.choice(rows)
        start = start[: generator.randint(0, len(start))]
        rows.append(start + [generator.randrange(300) for _ in range(generator.randint(1, longest - len(start) or 1))])
    return rows


ROWS = {
    "tree": TREE,
    "one token": [[3]],
    "several blocks, rows longer than one": random_rows(40, 150),
    "only long rows": [list(range(70)), [*range(66), 9, 9]],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_states_are_those_of_the_rows_alone(name: str, attention: str, rows: list[list[int]]) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    model.config.use_cache = False
    model.set_attn_implementation(attention)
    assert goes_by_prefix(model) == (attention == "sdpa")
    prefixes = Prefixes.of(rows)
    found_ND = prefix_states(model, prefixes, torch.arange(len(prefixes.first)))
    for row, own in zip(rows, prefixes.of_rows, strict=True):
        expected_LD = trunk(model)(input_ids=torch.tensor([row])).last_hidden_state[0]
        torch.testing.assert_close(found_ND[own], expected_LD, rtol=1e-5, atol=1e-5)  # norms are in fp32


def test_prefixes_are_numbered_once() -> None:
    prefixes = Prefixes.of(TREE)
    assert len(prefixes.first) == len({tuple(row[: end + 1]) for row in TREE for end in range(len(row))})
    for row, own in zip(TREE, prefixes.of_rows, strict=True):
        for step, number in enumerate(own):
            where, at = prefixes.first[number]
            assert TREE[where][: at + 1] == row[: step + 1]
            assert prefixes.beginnings[number] == (own[step - 1] if step else -1)


@torch.no_grad()
def test_each_prefix_passes_once_and_only_those_asked_for_come_back() -> None:
    model = tiny_llama()
    prefixes = Prefixes.of([[1] * 40 + [token] for token in range(2, 30)])
    asked = torch.tensor([60, 3])
    found: list[torch.Tensor] = []
    assert tokens_seen(model, lambda: found.append(prefix_states(model, prefixes, asked))) == 80  # 68, made even by 16
    everything_ND = prefix_states(model, prefixes, torch.arange(len(prefixes.first)))
    assert torch.equal(found[0], everything_ND[asked])


@torch.no_grad()
def test_the_models_own_attention_is_back_afterwards() -> None:
    model = tiny_llama()
    expected = model(torch.tensor([[1, 2, 3]])).logits
    prefix_states(model, Prefixes.of(TREE), torch.tensor([0]))
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, expected)


def test_models_with_other_attention_are_left_to_themselves() -> None:
    model = tiny_llama()
    model.config.layer_types = ["sliding_attention"] * 4
    assert not goes_by_prefix(model)
    assert not goes_by_prefix(tiny_llama().train())
