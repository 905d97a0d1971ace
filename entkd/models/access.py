"""Load, save and look inside a causal language model.

Shape suffixes: B batch, L tokens of a row, D width, V rows of the output projection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from entkd.errors import UserError
from entkd.files import replacing

_LAYER_LISTS = ("layers", "h", "decoder.layers")
"""Where trunks keep their decoder layers: Llama, Qwen, Gemma; GPT-2; OPT."""

_MASKED_BY_US = ("opt",)
"""Model types that do not derive the mask of packed documents from the positions."""

_MASKED_BY_US_ON_ACCELERATORS = ("gpt2", "llama", "qwen2", "qwen3")
"""Model types that would derive it, but first look whether there is anything to mask, for which the host waits."""


def model_folder(folder: str | Path) -> Path:
    """The Transformers folder that ``folder`` is, or that a stage wrote inside it as ``model/``."""
    folder = Path(folder)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(f"{folder}: no config.json in it or in its model/ folder, so no model; check the path")


def load_model(
    folder: str | Path, dtype: torch.dtype | str = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal language model in ``folder``, in eval mode, without a key-value cache.

    The cache is off because Transformers isolates packed documents only without one.

    Raises
    ------
    UserError
        If the folder holds no model, or weights in pickled files only, which can run any code.
    """
    folder = model_folder(folder)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no *.safetensors file; pickled weights are not loaded, convert them to safetensors")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        local_files_only=True,
    )
    model.config.use_cache = False
    model.eval()
    return model


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        model_folder(folder), trust_remote_code=trust_remote_code, local_files_only=True
    )
    return tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a Transformers folder (safetensors, tokenizer) under a temporary name, then rename it."""
    # The cache is off only while this package packs documents; others load the saved model to generate.
    model.config.use_cache = True
    if model.generation_config is not None:
        model.generation_config.use_cache = True
    with replacing(Path(folder)) as partial:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    model.config.use_cache = False


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 over the folder's safetensors files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(model_folder(folder).glob("*.safetensors")):
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def model_sha256(folder: str | Path) -> str:
    """SHA-256 of what decides a model's outputs: its weights and its ``config.json`` (rotary base, norms, dropout)."""
    config = (model_folder(folder) / "config.json").read_bytes()
    return hashlib.sha256(config + weights_sha256(folder).encode()).hexdigest()


def trunk(model: PreTrainedModel) -> nn.Module:
    """The module that maps token ids to the last hidden state, final norm included."""
    module = getattr(model, model.base_model_prefix, None)
    if not isinstance(module, nn.Module):
        raise UserError(f"{type(model).__name__} has no trunk named `{model.base_model_prefix}`; use another model")
    return module


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers in order."""
    return list(_layer_list(model)[1])


def _layer_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder layers' qualified name and their list."""
    for name in _LAYER_LISTS:
        try:
            found = trunk(model).get_submodule(name)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return f"{model.base_model_prefix}.{name}", found
    raise UserError(
        f"{type(model).__name__}: decoder layers not found; looked for {', '.join(_LAYER_LISTS)} in its trunk"
    )


def output_weight(model: PreTrainedModel) -> nn.Parameter:
    """The output projection's weight: logits = hidden · weightᵀ."""
    weight: nn.Parameter = model.get_output_embeddings().weight
    return weight


def trunk_forward(
    model: PreTrainedModel,
    input_ids_BL: torch.Tensor,
    position_ids_BL: torch.Tensor,
    capture: Sequence[int] = (),
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Last hidden state (after the final norm), and the outputs of the layers ``capture``, each (B, L, D).

    Transformers keeps documents apart where ``position_ids_BL`` restart, but only with ``use_cache=False``. OPT gets
    a mask from us, and on an accelerator the common models too. A captured last layer is the state before the final
    norm.
    """
    captured: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            captured[index] = output[0] if isinstance(output, tuple) else output

        return hook

    layers = decoder_layers(model) if capture else []
    handles = [layers[index].register_forward_hook(keep(index)) for index in capture]
    try:
        output = trunk(model)(
            input_ids=input_ids_BL,
            position_ids=position_ids_BL,
            attention_mask=_packed_mask(position_ids_BL) if _masked_by_us(model, position_ids_BL.device) else None,
            use_cache=False,
        )
    finally:
        for handle in handles:
            handle.remove()
    return output.last_hidden_state, captured


def _masked_by_us(model: PreTrainedModel, device: torch.device) -> bool:
    config = model.config
    if config.model_type in _MASKED_BY_US:
        return True
    return (
        device.type != "cpu"
        and config.model_type in _MASKED_BY_US_ON_ACCELERATORS
        and config._attn_implementation == "sdpa"  # others want masks of another form
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    )


def _packed_mask(position_ids_BL: torch.Tensor) -> torch.Tensor:
    """(B, 1, L, L) True where a token sees another: an earlier one, or itself, of its own document."""
    document_BL = (position_ids_BL == 0).cumsum(-1)
    own_BLL = document_BL[:, :, None] == document_BL[:, None, :]
    return torch.tril(own_BLL)[:, None]


def vocab_rows(weight_VD: torch.Tensor, vocab_size: int, what: str = "model") -> int:
    """Rows of the output projection; refuses fewer than the tokenizer has tokens.

    More rows are padding: users cut both projections to ``vocab_size``.
    """
    rows = int(weight_VD.shape[0])
    if rows < vocab_size:
        raise UserError(
            f"{what}: its output projection has {rows} rows and the tokenizer {vocab_size} tokens; "
            "use a model made for this tokenizer"
        )
    return rows


def assert_finite(model: nn.Module, what: str) -> None:
    """Refuse NaN and infinite weights, naming the first tensor that has any."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise UserError(f"{what}: tensor `{name}` has {count} NaN or infinite values; get an intact copy")


@torch.no_grad()
def assert_packing(model: PreTrainedModel, what: str) -> None:
    """Refuse models in which a packed document sees the one before it."""
    device = output_weight(model).device
    first, second = torch.arange(4, device=device)[None], torch.arange(4, 8, device=device)[None]
    positions_BL = torch.arange(4, device=device)[None]
    alone_BLD, _ = trunk_forward(model, second, positions_BL)
    packed_BLD, _ = trunk_forward(model, torch.cat([first, second], 1), torch.cat([positions_BL, positions_BL], 1))
    error = _relative_error(packed_BLD[:, 4:], alone_BLD)
    if error > _tolerance(model):
        raise UserError(
            f"{what}: in {type(model).__name__} packed documents see each other (relative difference {error:.2g}); "
            "training packs documents into blocks, so choose another model"
        )


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-6))


def _tolerance(model: PreTrainedModel) -> float:
    """Relative difference that rounding explains in the model's own dtype."""
    return 1e-3 if output_weight(model).dtype == torch.float32 else 5e-2


@torch.no_grad()
def assert_linear_head(model: PreTrainedModel, what: str) -> None:
    """Refuse models whose logits are not hidden · weightᵀ: soft-capping, logit scaling, a head with a bias.

    Losses here project hidden states themselves, so such a model would be trained on other logits than it has.
    """
    weight_VD = output_weight(model)
    ids_BL = torch.arange(8, device=weight_VD.device)[None] % weight_VD.shape[0]
    positions_BL = torch.arange(8, device=weight_VD.device)[None]
    hidden_BLD, _ = trunk_forward(model, ids_BL, positions_BL)
    logits_BLV = model(input_ids=ids_BL, position_ids=positions_BL, use_cache=False).logits
    error = _relative_error(nn.functional.linear(hidden_BLD, weight_VD), logits_BLV)
    if error > _tolerance(model):
        raise UserError(
            f"{what}: {type(model).__name__} does not make its logits by a plain linear map of the last hidden state "
            f"(relative difference {error:.2g}); soft-capping, logit scaling and a head with a bias are not supported"
        )
