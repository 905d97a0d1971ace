"""Teacher and student: where they come from, and access to trunk, layers and head of any common layout."""

from entkd.models.access import (
    assert_finite,
    assert_linear_head,
    assert_packing,
    decoder_layers,
    layer_points,
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
from entkd.models.on_cpu import gather_embedding_gradient
from entkd.models.student import init_student
from entkd.models.teacher import prepare_teacher

__all__ = [
    "assert_finite",
    "assert_linear_head",
    "assert_packing",
    "decoder_layers",
    "gather_embedding_gradient",
    "init_student",
    "layer_points",
    "load_model",
    "load_tokenizer",
    "model_folder",
    "model_sha256",
    "output_weight",
    "packed_states",
    "prepare_teacher",
    "save_model",
    "trunk",
    "trunk_forward",
    "vocab_rows",
    "weights_sha256",
]
