"""Teacher and student: where they come from, and access to trunk, layers and head of any common layout."""

from entkd.config.folders import layer_points
from entkd.models.access import (
    assert_finite,
    assert_linear_head,
    assert_packing,
    decoder_layers,
    load_model,
    load_tokenizer,
    model_folder,
    model_sha256,
    output_weight,
    save_model,
    trunk,
    trunk_forward,
    vocab_rows,
    weights_sha256,
)
from entkd.models.by_document import packed_states
from entkd.models.by_prefix import Prefixes, goes_by_prefix, prefix_states
from entkd.models.on_cpu import gather_embedding_gradient, prepare_for_cpu
from entkd.models.student import init_student
from entkd.models.teacher import prepare_teacher

__all__ = [
    "Prefixes",
    "assert_finite",
    "assert_linear_head",
    "assert_packing",
    "decoder_layers",
    "gather_embedding_gradient",
    "goes_by_prefix",
    "init_student",
    "layer_points",
    "load_model",
    "load_tokenizer",
    "model_folder",
    "model_sha256",
    "output_weight",
    "packed_states",
    "prefix_states",
    "prepare_for_cpu",
    "prepare_teacher",
    "save_model",
    "trunk",
    "trunk_forward",
    "vocab_rows",
    "weights_sha256",
]
