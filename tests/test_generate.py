from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import ending_early, tiny_llama
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from entkd.generate import _first_above, _invert, choose, generate


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 300, length).tolist() for length in (5, 1, 9, 3, 9, 2, 7)]


def reference(model, prompt: list[int], new_tokens: int) -> list[int]:
    """Transformers' greedy continuation of one unpadded prompt."""
    ids = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=new_tokens, eos_token_id=2, pad_token_id=2
    )
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_greedy_equals_transformers(tokenizer, prompts: list[list[int]], batch: int) -> None:
    model = ending_early(prompts)
    expected = [reference(model, prompt, 24) for prompt in prompts]
    assert len({len(response) for response in expected}) > 2  # rows end at different steps, so rows are dropped
    assert generate(model, tokenizer, prompts, max_new_tokens=24, max_length=99, batch=batch) == expected


def test_greedy_equals_transformers_with_learned_positions(tokenizer, prompts: list[list[int]]) -> None:
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, **ends)
    model = GPT2LMHeadModel(config).eval()
    expected = [reference(model, prompt, 12) for prompt in prompts]
    assert generate(model, tokenizer, prompts, max_new_tokens=12, max_length=99, batch=4) == expected


def test_ended_rows_leave_the_cache(tokenizer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    original = DynamicCache.batch_select_indices

    def select(self, indices: torch.Tensor) -> None:
        kept.append(len(indices))
        original(self, indices)

    monkeypatch.setattr(DynamicCache, "batch_select_indices", select)
    outputs = generate(ending_early(prompts), tokenizer, prompts, max_new_tokens=24, max_length=99)
    ended = sum(output[-1] == 2 for output in outputs)
    assert ended >= 2
    assert kept == sorted(kept, reverse=True)
    assert kept[0] < len(prompts)


def test_end_token_is_kept_and_nothing_follows_it(tokenizer, prompts: list[list[int]]) -> None:
    stream = torch.Generator().manual_seed(0)
    outputs = generate(
        ending_early(prompts),
        tokenizer,
        prompts * 8,
        max_new_tokens=30,
        max_length=99,
        temperature=1.5,
        generator=stream,
        eos_token_id=7,
    )
    assert all(1 <= len(output) <= 30 for output in outputs)
    assert all(7 not in output[:-1] for output in outputs)
    assert all(len(output) == 30 for output in outputs if output[-1] != 7)
    assert any(output[-1] == 7 for output in outputs)


def test_padded_vocabulary_rows_are_never_chosen(tokenizer) -> None:
    model = tiny_llama(vocab_size=320, seed=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[300:] *= 50  # the largest logits by far, where the tokenizer has no tokens
    prompts = [[5, 6, 7]] * 4
    assert model(torch.tensor(prompts)).logits[:, -1].argmax(-1).min() >= 300
    outputs = generate(model, tokenizer, prompts, max_new_tokens=8, max_length=99)
    assert max(token for output in outputs for token in output) < 300


def test_equal_prompts_pass_the_model_once(tokenizer, prompts: list[list[int]]) -> None:
    model = ending_early(prompts)
    repeated = [prompts[index] for index in (0, 2, 0, 3, 2, 2)]
    read: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    outputs = generate(model, tokenizer, repeated, max_new_tokens=12, max_length=99)
    handle.remove()
    assert read[:2] == [3, 6]
    assert outputs == [reference(model, prompt, 12) for prompt in repeated]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_attention_in_bf16_always_has_a_mask(
    tokenizer, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[bool] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def attend(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask is not None)
        return original(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    model = tiny_llama().to(precision)
    generate(model, tokenizer, [[5, 6, 7], [8, 9, 10]], max_new_tokens=4, max_length=99)
    assert set(masks) == {precision == torch.bfloat16}


def test_sliding_windows_keep_their_cache(tokenizer, prompts: list[list[int]]) -> None:
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = Gemma3TextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        initializer_range=0.3,
        **ends,
    )
    model = Gemma3ForCausalLM(config).eval()
    expected = [reference(model, prompt, 16) for prompt in prompts]
    assert generate(model, tokenizer, prompts, max_new_tokens=16, max_length=99, batch=4) == expected


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_rows_drawn_in_blocks_are_those_drawn_at_once(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = 2 * torch.randn(37, 1000, generator=torch.Generator().manual_seed(0))
    logits = logits.bfloat16()

    def draw(rows: int, temperature: float) -> list[int]:
        monkeypatch.setattr("entkd.generate._ROWS", rows)
        return choose(logits, temperature, top_p, torch.Generator().manual_seed(5)).tolist()

    assert draw(4, 0.8) == draw(37, 0.8) == draw(1, 0.8)
    assert draw(4, 0.0) == logits.float().argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [7, 256, 1000, 1024])
def test_greedy_token_is_the_first_of_the_largest_logits(dtype: torch.dtype, vocabulary: int) -> None:
    # Few values, so that several tokens of one chunk and of several chunks have the largest.
    logits = torch.randint(-3, 3, (50, 1100), generator=torch.Generator().manual_seed(0)).to(dtype)[:, :vocabulary]
    logits[1] = -torch.inf
    logits[2, 3:] = -torch.inf
    logits[3, 5] = torch.nan
    expected = logits.double().numpy().argmax(-1)
    assert choose(logits, 0.0).tolist() == expected.tolist()
    assert expected[3] == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_reordered_weights_write_the_same_text(
    tokenizer, prompts: list[list[int]], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=128).bfloat16()
    seen: list[bool] = []
    model.model.register_forward_pre_hook(lambda module, _: seen.append("forward" in vars(model.lm_head)))

    def write() -> list[list[int]]:
        draws = {"temperature": temperature, "generator": torch.Generator().manual_seed(0)}
        return generate(model, tokenizer, prompts * 6, max_new_tokens=33, max_length=36, batch=30, **draws)

    reordered = write()
    assert all(seen) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    monkeypatch.setattr("entkd.generate._REORDER_FROM", 36)
    seen.clear()
    assert write() == reordered
    assert not any(seen)


def test_samples_repeat_with_the_stream(tokenizer, prompts: list[list[int]]) -> None:
    def sample(seed: int) -> list[list[int]]:
        stream = torch.Generator().manual_seed(seed)
        return generate(
            tiny_llama(), tokenizer, prompts, max_new_tokens=6, max_length=99, temperature=1.0, generator=stream
        )

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize("top_p", [1.0, 0.85])
def test_samples_follow_the_nucleus_distribution(top_p: float) -> None:
    logits = torch.tensor([2.0, -1.0, 1.0, 0.5, 3.0, -30.0])
    probs = np.exp(logits.double().numpy() / 0.8)
    probs /= probs.sum()
    # By sorting: the smallest set of most probable tokens whose mass reaches top_p.
    order = np.argsort(-probs)
    size = int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1
    nucleus = order[:size]
    stream = torch.Generator().manual_seed(0)
    drawn = choose(logits.repeat(20000, 1), 0.8, top_p, stream).numpy()
    assert set(drawn.tolist()) <= set(nucleus.tolist())
    likely = nucleus[probs[nucleus] > 1e-6]
    counts = np.bincount(drawn, minlength=6)[likely]
    expected = probs[likely] / probs[likely].sum() * counts.sum()
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_certain_token_is_drawn_and_impossible_tokens_are_not() -> None:
    logits = torch.full((64, 9), -torch.inf)
    logits[:, 4] = 0.0
    stream = torch.Generator().manual_seed(0)
    assert choose(logits, 1.0, 0.5, stream).tolist() == [4] * 64
    assert choose(logits, 1.0, 1.0, stream).tolist() == [4] * 64


@pytest.mark.parametrize("vocabulary", [256, 300, 1000])
def test_two_levels_of_sums_draw_what_one_running_sum_does(vocabulary: int) -> None:
    logits = 3 * torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(3))
    logits[:, 250:270] = -torch.inf
    logits[1, -40:] = -torch.inf
    probs = torch.softmax(logits, -1)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    for row in range(2):
        running = probs[row].double().cumsum(0).numpy()
        expected = np.searchsorted(running, grid.numpy() * running[-1], side="right")
        assert _invert(probs[row].expand(2000, -1), grid).tolist() == expected.tolist()
    assert (probs[[0, 1], _invert(probs, torch.full((2,), 1 - 2**-53, dtype=torch.float64))] > 0).all()


def test_what_rounding_leaves_above_every_sum_is_the_last_token_that_has_a_probability() -> None:
    cdf = torch.tensor([[0.2, 0.7, 0.7]], dtype=torch.float64)
    wanted = torch.tensor([[0.0, 0.2, 0.7, 0.8]], dtype=torch.float64)
    assert [int(_first_above(cdf, wanted[:, i : i + 1].contiguous())) for i in range(4)] == [0, 1, 1, 1]


def test_continuations_stop_at_the_longest_length(tokenizer, prompts: list[list[int]]) -> None:
    model = tiny_llama()
    outputs = generate(model, tokenizer, prompts, max_new_tokens=6, max_length=10)
    full = generate(model, tokenizer, prompts, max_new_tokens=6, max_length=99)
    assert [len(output) for output in outputs] == [5, 6, 1, 6, 1, 6, 3]  # prompts of 5, 1, 9, 3, 9, 2, 7 tokens
    assert all(output == whole[: len(output)] for output, whole in zip(outputs, full, strict=True))
