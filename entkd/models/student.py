"""The student before training: chosen teacher layers, a model of its own, or random weights."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from entkd.config import Student
from entkd.config.folders import layers_problem, tokenizer_problem
from entkd.errors import UserError
from entkd.models.access import (
    _layer_list,
    assert_finite,
    assert_linear_head,
    assert_packing,
    load_model,
    load_tokenizer,
    model_folder,
    output_weight,
    save_model,
    vocab_rows,
)
from entkd.models.teacher import load_hub, write_manifest
from entkd.runtime import stream_seed


def init_student(settings: Student, teacher: str | Path, output: str | Path, seed: int) -> None:
    """Write ``output/model/`` (fp32 safetensors, the teacher's tokenizer) and, last, ``output/manifest.json``.

    Raises
    ------
    UserError
        If a layer is out of range, the tokenizer is not the teacher's, or the vocabulary is too small.
    """
    output = Path(output)
    tokenizer = load_tokenizer(teacher)
    if settings.init == "layers":
        model = copy_layers(load_model(teacher), settings.layers)
    elif settings.init == "scratch":
        model = _from_scratch(teacher, settings.config, seed)
    elif settings.init == "local":
        folder = model_folder(settings.path or "")
        model = load_model(folder, trust_remote_code=settings.trust_remote_code)
        _same_tokenizer(load_tokenizer(folder), tokenizer, str(settings.path))
    else:
        model, own = load_hub(
            str(settings.repo), str(settings.revision), settings.trust_remote_code, dtype=torch.float32
        )
        _same_tokenizer(own, tokenizer, str(settings.repo))
    assert_finite(model, "student")
    vocab_rows(output_weight(model), len(tokenizer), "student")
    assert_linear_head(model, "student")
    assert_packing(model, "student")
    save_model(model, tokenizer, output / "model")
    write_manifest(output, {"settings": settings.model_dump(mode="json"), "parameters": model.num_parameters()})


def copy_layers(teacher: PreTrainedModel, layers: tuple[int, ...]) -> PreTrainedModel:
    """A shallower model with the teacher's embeddings, head, final norm and the decoder layers ``layers``."""
    prefix, teacher_layers = _layer_list(teacher)
    problem = layers_problem(layers, len(teacher_layers))
    if problem:
        raise UserError(problem)
    changes: dict[str, object] = {"num_hidden_layers": len(layers)}
    layer_types = getattr(teacher.config, "layer_types", None)
    if layer_types is not None:  # models that mix full and sliding attention name each layer's kind
        changes["layer_types"] = [layer_types[layer] for layer in layers]
    student: PreTrainedModel = AutoModelForCausalLM.from_config(_changed(teacher.config, changes), dtype=torch.float32)
    source = teacher.state_dict()
    state = {}
    for name in student.state_dict():
        if name.startswith(f"{prefix}."):
            index, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            state[name] = source[f"{prefix}.{layers[int(index)]}.{rest}"]
        else:
            state[name] = source[name]
    student.load_state_dict(state)
    student.eval()
    return student


def _from_scratch(teacher: str | Path, changes: dict[str, object], seed: int) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(model_folder(teacher), local_files_only=True)
    for key in changes:
        if not hasattr(config, key):
            near = difflib.get_close_matches(key, config.to_dict(), n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise UserError(f"student.config.{key}: a {config.model_type} configuration has no such key{hint}")
    if "num_hidden_layers" in changes and "layer_types" not in changes and getattr(config, "layer_types", None):
        changes = {**changes, "layer_types": None}  # the model's own pattern for the new depth
    # Transformers initialises from the global generator; the fork leaves the caller's state as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "init"))
        model: PreTrainedModel = AutoModelForCausalLM.from_config(_changed(config, changes), dtype=torch.float32)
    model.eval()
    return model


def _changed(config: PreTrainedConfig, changes: dict[str, object]) -> PreTrainedConfig:
    """A copy of the configuration with some keys replaced, validated by its own class."""
    values = config.to_dict()
    for key, value in changes.items():
        values[config.attribute_map.get(key, key)] = value
    changed: PreTrainedConfig = type(config).from_dict(values)
    changed.use_cache = False
    return changed


def _same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, what: str) -> None:
    """Refuse a student whose token ids mean other tokens than the teacher's."""
    problem = tokenizer_problem(student.get_vocab(), teacher.get_vocab(), what)
    if problem:
        raise UserError(problem)
