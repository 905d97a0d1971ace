"""The training step and the teacher's statistics on a pretended GPU: no host sync, no tensor of another device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from fake_device import DEVICE, GPU, HostSyncError, Watch, needs_fork, on_gpu, put_on_gpu
from tiny_models import tiny_llama
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import entkd.closeness
import entkd.kernels
import entkd.signals.teacher_pass
import entkd.tiles
from entkd.config import DIVERGENCE_NAMES, Method, Signals, Training
from entkd.data.packing import Batch
from entkd.distill.distributed import World
from entkd.distill.metrics import Metrics
from entkd.distill.micro_batch import MicroBatch
from entkd.distill.objective import Objective
from entkd.distill.optim import build_optimizer, clip_gradients, set_learning_rate
from entkd.distill.scan import scans, with_factors
from entkd.features import feature_loss
from entkd.fused import linear_statistics
from entkd.methods import APPROACHES
from entkd.models import access, trunk_forward
from entkd.runtime import to_device
from entkd.signals.kept import room
from entkd.signals.teacher_pass import token_statistics

pytestmark = needs_fork

VOCAB, TEACHER_WIDTH, BLOCK, N, H = 300, 24, 32, 11, 4
FULL = {"ce": {"weight": 0.3}, "temperature": {}, "features": {"points": 1}}
# The divergences themselves compute in fp32 either way: two stand for the rest, one with a gradient of its own.
CASES = [(name, True) for name in DIVERGENCE_NAMES] + [("forward_kl", False), ("jsd", False)]


@pytest.fixture(autouse=True)
def _several_tiles_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (entkd.tiles, entkd.closeness):
        monkeypatch.setattr(module, "tile_rows", lambda vocab, device: 6)
        monkeypatch.setattr(module, "piece_rows", lambda vocab, device: 4)
    monkeypatch.setattr(entkd.signals.teacher_pass, "TILE_ELEMENTS", 4 * VOCAB)


def micro_batch(method: Method, logprobs: bool = False) -> MicroBatch:
    """Two packed blocks in host memory, as `TeacherTargets` makes them."""

    def ids(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int64)

    batch = Batch(ids(2, BLOCK), ids(2, BLOCK), ids(N), ids(N), ids(N))
    teacher = torch.empty(N, VOCAB, dtype=torch.float16) if logprobs else torch.empty(N, TEACHER_WIDTH).bfloat16()
    features = (torch.empty(H, TEACHER_WIDTH, dtype=torch.bfloat16),)
    return MicroBatch(
        batch,
        teacher_NE=lambda: teacher,
        weight_N=torch.ones(N) if method.curriculum is not None else None,
        temperature_N=torch.ones(N) if method.temperature is not None else None,
        hard_H=ids(H) if method.features is not None else None,
        teacher_features=features if method.features is not None else (),
    )


def train(
    method: Method, bf16: bool = True, logprobs: bool = False, on_host: bool = False, steps: int = 1
) -> list[str]:
    """Steps of two micro-batches in the order of `entkd.distill.loop.train`; returns the names of the terms."""
    training = Training(steps=steps, clip=1.0)
    student = tiny_llama(VOCAB, num_hidden_layers=1).train()
    head_UE = None if logprobs else torch.empty(VOCAB, TEACHER_WIDTH, dtype=torch.bfloat16)
    objective = put_on_gpu(Objective(student, method, VOCAB, head_UE, TEACHER_WIDTH))
    projector_lr = method.features.projector_lr if method.features is not None else None
    optimizer = build_optimizer(student, objective.projectors, training, projector_lr)
    metrics = Metrics()
    with Watch():
        for _ in range(steps):
            set_learning_rate(optimizer, 1e-3, training)
            optimizer.zero_grad(set_to_none=True)
            terms: dict[str, Tensor] = {}
            micro_batches = [micro_batch(method, logprobs), micro_batch(method, logprobs)]
            if scans(method, len(micro_batches)):
                dtype = torch.bfloat16 if bf16 else torch.float32
                micro_batches = with_factors(objective, micro_batches, World(), DEVICE, dtype, 2 * N, 2 * N)
            for micro in micro_batches:
                with torch.autocast(GPU, dtype=torch.bfloat16, enabled=bf16):
                    losses = objective(micro if on_host else micro.to(DEVICE), 2 * N, 2 * H, selected=2 * N)
                losses["loss"].backward()
                for name, value in losses.items():
                    terms[name] = terms[name] + value.detach() if name in terms else value.detach()
            norm = clip_gradients(student, objective.projectors, training.clip, optimizer)
            optimizer.step()
            of_approach = {}
            if objective.approach is not None:
                of_approach = objective.approach.logged()
                objective.approach.end_step(terms, 1, 2)
            metrics.add({"step": 1}, terms | {"grad_norm": norm} | of_approach, 0.0)
    assert all(p.grad is not None and p.grad.device == DEVICE for p in objective.parameters())
    assert all(value.device == DEVICE for value in (*terms.values(), norm))
    return sorted(terms)


# ── what the harness sees ─────────────────────────────────────────────────────────────────────────────────────────

SPOILS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x_ND: x_ND.sum().item(),
    "bool": lambda x_ND: bool(x_ND.isnan().any()),
    "float": lambda x_ND: float(x_ND.sum()),
    "tolist": lambda x_ND: x_ND.tolist(),
    "nonzero": lambda x_ND: x_ND.nonzero(),
    "mask read": lambda x_ND: x_ND[x_ND > 0],
    "mask written": lambda x_ND: x_ND.detach().clone().index_put_((x_ND > 0,), x_ND[0]),
    "unique": lambda x_ND: x_ND.unique(),
    "equal": lambda x_ND: torch.equal(x_ND, x_ND),
    "cpu": lambda x_ND: x_ND.cpu(),
    "copy to the host": lambda x_ND: torch.empty(x_ND.shape).copy_(x_ND, non_blocking=True),
    "CPU tensor": lambda x_ND: x_ND * torch.ones(len(x_ND), 1),
    "CPU scalar": lambda x_ND: torch.where(x_ND > 0, x_ND, torch.ones(())),
    "CPU indices": lambda x_ND: x_ND[torch.zeros(2, dtype=torch.int64)],
    "not pinned": lambda x_ND: torch.ones(2).to(x_ND.device, non_blocking=True),
    "waits for the copy": lambda x_ND: torch.ones(2).pin_memory().to(x_ND.device),
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_sync_put_into_the_step_is_seen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def spoiled(student_ND: Tensor, *others: object) -> Tensor:
        SPOILS[name](student_ND)
        return feature_loss(student_ND, *others)

    monkeypatch.setattr("entkd.distill.objective.feature_loss", spoiled)
    with pytest.raises(HostSyncError, match=r"objective\.py:\d+"):
        on_gpu(lambda: train(Method.model_validate(FULL | {"divergence": "forward_kl"})))


def test_a_sync_in_the_backward_pass_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(student_ND: Tensor, *others: object) -> Tensor:
        student_ND.register_hook(lambda grad_ND: None if grad_ND.isfinite().all() else grad_ND)
        return feature_loss(student_ND, *others)

    monkeypatch.setattr("entkd.distill.objective.feature_loss", spoiled)
    with pytest.raises(HostSyncError, match="_local_scalar_dense"):
        on_gpu(lambda: train(Method.model_validate(FULL | {"divergence": "forward_kl"})))


def test_a_batch_left_on_the_host_is_seen() -> None:
    with pytest.raises(HostSyncError, match="a CPU tensor meets one of the device"):
        on_gpu(lambda: train(Method.model_validate({"ce": {}}), on_host=True))


def test_errors_that_are_no_syncs_are_no_syncs() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError") as caught:
        on_gpu(lambda: 1 / 0)
    assert not isinstance(caught.value, HostSyncError)


# ── the training step ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "bf16"), CASES)
def test_the_step_with_all_components_never_waits(name: str, bf16: bool) -> None:
    method = Method.model_validate(FULL | {"divergence": name, "curriculum": {}})
    assert on_gpu(lambda: train(method, bf16)) == ["ce", "features", "kd", "loss"]


@pytest.mark.parametrize(
    "method",
    [
        {"divergence": {"name": "adaptive_kl", "variant": "cover"}},
        {"divergence": "forward_kl"},
        {"ce": {}},
        {"ce": {}, "features": {"loss": "mse", "points": 1}},
    ],
)
def test_the_step_of_other_methods_never_waits(method: dict[str, object]) -> None:
    assert "loss" in on_gpu(lambda: train(Method.model_validate(method), steps=2))


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", APPROACHES)
def test_the_step_of_published_approaches_never_waits(name: str, bf16: bool) -> None:
    """Statistics, the pass over the global batch, and the state included."""
    method = Method.model_validate({"divergence": "forward_kl", "ce": {}, "approach": name, "curriculum": {}})
    assert {"kd", "ce", "loss"} <= set(on_gpu(lambda: train(method, bf16)))


def test_the_step_from_stored_log_probabilities_never_waits() -> None:
    method = Method.model_validate({"divergence": "forward_kl", "temperature": {}})
    assert on_gpu(lambda: train(method, logprobs=True)) == ["kd", "loss"]


@pytest.mark.parametrize("like", [torch.zeros(3, 2), torch.zeros(0, 2)], ids=["rows", "empty"])
def test_copies_to_the_device_are_pinned_and_do_not_wait(like: Tensor) -> None:
    def body() -> tuple[str, tuple[int, ...], str]:
        with Watch() as watch:
            moved = to_device(torch.empty(like.shape), DEVICE)
        assert len(watch.pinned) == 1
        return moved.device.type, tuple(moved.shape), to_device(moved, DEVICE).device.type

    assert on_gpu(body) == (GPU, tuple(like.shape), GPU)
    assert to_device(like, torch.device("cpu")) is like


def models() -> Iterator[tuple[str, Callable[[], torch.nn.Module]]]:
    small = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    grouped = small | {"num_key_value_heads": 1, "intermediate_size": 32}
    yield "llama", lambda: tiny_llama(VOCAB)
    yield "qwen2", lambda: Qwen2ForCausalLM(Qwen2Config(**grouped))
    yield "qwen3", lambda: Qwen3ForCausalLM(Qwen3Config(**grouped, head_dim=8))
    yield "gpt2", lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2))
    yield "opt", lambda: OPTForCausalLM(OPTConfig(**small, ffn_dim=32, word_embed_proj_dim=16))


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in models()])
def test_the_trunk_of_common_layouts_never_waits(make: Callable[[], torch.nn.Module]) -> None:
    def body() -> str:
        model = put_on_gpu(make().train())
        ids_BL = torch.zeros(2, BLOCK, dtype=torch.int64, device=DEVICE)
        with Watch():
            hidden_BLD, captured = trunk_forward(model, ids_BL, ids_BL, capture=(0, 1))
            (hidden_BLD.sum() + captured[0].sum()).backward()
        return hidden_BLD.device.type

    assert on_gpu(body) == GPU


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in models() if name != "opt"])
def test_our_mask_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch, make: Callable[[], torch.nn.Module]) -> None:
    """Documents of 5 and 4 tokens and padding; one whole document."""
    model = make().eval()
    ids_BL = torch.arange(24).reshape(2, 12)
    positions_BL = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0], list(range(12))])
    model.config.use_cache = False
    with torch.no_grad():
        expected_BLD, _ = trunk_forward(model, ids_BL, positions_BL)
        assert model.config.model_type in access._MASKED_BY_US_ON_ACCELERATORS
        assert access._masked_by_us(model, torch.device("cuda"))
        assert not access._masked_by_us(model, torch.device("cpu"))
        monkeypatch.setattr(access, "_masked_by_us", lambda *_: True)
        found_BLD, _ = trunk_forward(model, ids_BL, positions_BL)
    torch.testing.assert_close(found_BLD, expected_BLD, rtol=0, atol=0)


def test_windows_and_other_masks_are_left_to_transformers() -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    window = Qwen2Config(vocab_size=VOCAB, **shape, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    model = Qwen2ForCausalLM(window)
    assert not access._masked_by_us(model, torch.device("cuda"))
    model = tiny_llama(VOCAB, attn_implementation="eager")
    assert not access._masked_by_us(model, torch.device("cuda"))


# ── the teacher's statistics ──────────────────────────────────────────────────────────────────────────────────────


def noted(body: Callable[[], object]) -> list[str]:
    with Watch(raises=False) as watch:
        body()
    return watch.syncs


@pytest.mark.parametrize("keep_logprobs", [False, True], ids=["statistics", "logprobs"])
def test_statistics_of_the_teacher_wait_once_a_batch(keep_logprobs: bool) -> None:
    """Three tiles, one sync; log-probabilities leave the device tile by tile, since they are too many to stay."""

    def body() -> list[str]:
        hidden_NE = torch.empty(N, TEACHER_WIDTH, dtype=torch.bfloat16, device=DEVICE)
        head_UE = torch.empty(VOCAB, TEACHER_WIDTH, device=DEVICE)
        target_N = torch.zeros(N, dtype=torch.int64, device=DEVICE)
        settings = Signals(mode="logprobs" if keep_logprobs else "hidden")
        _, _, keep = room(settings, "train", np.arange(1), np.asarray([N]), VOCAB, TEACHER_WIDTH)
        return noted(lambda: token_statistics(hidden_NE, head_UE, target_N, keep, torch.arange(N)))

    syncs = on_gpu(body)
    assert len([sync for sync in syncs if "_local_scalar_dense" in sync]) == 1
    assert len(syncs) == (1 + 3 if keep_logprobs else 1), syncs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_the_student_never_wait(dtype: torch.dtype) -> None:
    def body() -> str:
        student_ND, teacher_NE, head_UD = (
            torch.empty(*shape, dtype=dtype, device=DEVICE) for shape in ((N, 8), (N, 8), (VOCAB, 8))
        )
        with Watch():
            found = linear_statistics(student_ND, head_UD, teacher_NE, head_UD, vocab_size=VOCAB - 3)
        return found["divergence"].device.type

    assert on_gpu(body) == GPU
