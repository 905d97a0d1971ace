"""Load a GGUF file through Transformers, without the work that it does over and over."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The de-quantised fp32 model and the tokenizer of a GGUF file."""
    with read_once():
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    config = loaded.config
    # Transformers marks the model as quantised although its weights are fp32 now, and save_pretrained refuses
    # it; a model built from the cleaned configuration is an ordinary one.
    del config.quantization_config
    with _no_random_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()  # what goes without random weights goes without this
    model.load_state_dict(loaded.state_dict())
    model.config.use_cache = False
    model.eval()
    return model, tokenizer


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Within the block, a GGUF file's header is read once and the table of a model's tensor names is made once.

    Transformers asks for the header for the configuration, the weights and the tokenizer, and for the table in every
    submodule. It takes both out of the package `gguf` when it needs them; should a version get them otherwise, loading
    is as slow as without this.
    """
    faster = {"GGUFReader": _reader_of_one_header, "get_tensor_name_map": functools.cache}
    plain = {name: getattr(gguf, name) for name in faster if hasattr(gguf, name)}
    try:
        for name, original in plain.items():
            setattr(gguf, name, faster[name](original))
        yield
    finally:
        for name, original in plain.items():
            setattr(gguf, name, original)


def _reader_of_one_header(plain: Any) -> Any:
    """A subclass of gguf's reader whose instances for the same file share what the first of them read."""
    read: dict[str, dict[str, Any]] = {}

    class Reader(plain):  # type: ignore[misc]  # the class is only known here
        def __init__(self, *args: Any, **options: Any) -> None:
            key = repr((args, options))
            if key in read:
                self.__dict__ = read[key]
            else:
                super().__init__(*args, **options)
                read[key] = self.__dict__

        def __setattr__(self, name: str, value: Any) -> None:
            # The same memory as an ordinary array: each of a quarter of a million slices of a memmap costs far more.
            super().__setattr__(name, np.asarray(value) if isinstance(value, np.memmap) else value)

    return Reader


def _no_random_weights() -> contextlib.AbstractContextManager[None]:
    """Leaves out the random weights that the file's replace; does nothing where Transformers has no such function."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        return contextlib.nullcontext()
    return no_init_weights()
