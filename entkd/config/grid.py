"""Which keys of the declared grids count for an arm.

A divergence, an approach or a schedule of student text has keys of its own, and two of them may share a name (α of
skew_kl is no α of alpha_beta). A key may therefore say whose it is, `method.divergence.skew_kl.alpha`, and has to where
arms with several of them are tuned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from entkd.config.arms import ResolvedArm
from entkd.config.errors import nearest
from entkd.config.method import DIVERGENCE_NAMES
from entkd.config.stages import Training
from entkd.methods import APPROACHES
from entkd.methods.distillm import DistiLLM
from entkd.methods.gkd import GKD
from entkd.settings import all_keys, idle_keys

TRAINING_KEYS = ("lr", "schedule", "warmup", "betas", "weight_decay", "clip")
"""Training settings that may differ between trials: none that changes what a run costs."""
FIXED = ("name", "version")
"""Keys that say what a term is."""
NAMED = {
    "divergence": DIVERGENCE_NAMES,
    "approach": tuple(APPROACHES),
    "on_policy": tuple(settings.model_fields["name"].default for settings in (GKD, DistiLLM)),
}
"""Terms of which there are several, and their names."""
SHARED = ("weight",)
"""Keys that mean the same in all of them."""

Arms = Mapping[str, tuple[ResolvedArm, Mapping[str, Any]]]
"""Each tuned arm and its own patch."""


def leaves(settings: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Dotted paths of everything in nested settings that is no mapping."""
    for key, value in settings.items():
        below = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            yield from leaves(value, below)
        else:
            yield below


def keys_of(arm: ResolvedArm) -> set[str]:
    """Dotted keys of an arm's method that mean something there: of others every value trains the same student."""
    terms = ((term, getattr(arm.method, term)) for term in arm.trained_method)
    keys = (key for term, settings in terms for key in all_keys(settings, f"method.{term}."))
    return {key for key in keys if not _idle(arm, key)}


def written_values(arm: ResolvedArm, training: Training) -> dict[str, Any]:
    """Dotted key → value of an arm as it is written, defaults included."""
    whole = {"training": training.model_dump(mode="json")}
    return {key: _at(arm, key) for key in keys_of(arm)} | {key: _at(whole, key) for key in leaves(whole)}


def grid_of(
    grids: Mapping[str, tuple[Any, ...]], arm: ResolvedArm, patch: Mapping[str, Any]
) -> dict[str, tuple[Any, ...]]:
    """The keys that count for an arm: it has them, and its own ``patch`` does not set them.

    A key that says whose it is counts before one that does not, and is returned without saying so.
    """
    own = set(leaves({"method": patch}))
    has = keys_of(arm) | {f"training.{name}" for name in TRAINING_KEYS}
    found: dict[str, tuple[Any, ...]] = {}
    for key in sorted(grids, key=lambda key: (_owner(key) is not None, key)):
        plain = plain_key(key)
        if plain in has - own and _owner(key) in (None, _name(arm, key)):
            found[plain] = grids[key]
    return dict(sorted(found.items()))


def plain_key(key: str) -> str:
    """`method.approach.start` of `method.approach.taid.start`."""
    owner = _owner(key)
    return key if owner is None else key.replace(f".{owner}.", ".", 1)


def grid_problems(grids: Mapping[str, tuple[Any, ...]], arms: Arms) -> Iterator[str]:
    """One line for each key that counts for no tuned arm, or for two terms in which it is not the same."""
    has = {key for arm, _ in arms.values() for key in keys_of(arm)}
    for key, values in grids.items():
        counting = [arm for arm, patch in arms.values() if plain_key(key) in grid_of({key: values}, arm, patch)]
        whole = ((arm, grid_of(grids, arm, patch)) for arm, patch in arms.values())
        meant = [arm for arm, grid in whole if grid.get(plain_key(key)) is values]
        names = sorted({name for arm in meant if (name := _name(arm, key))})
        if len(names) > 1 and _owner(key) is None and key.rpartition(".")[2] not in SHARED:
            head, _, rest = key.removeprefix("method.").partition(".")
            written = " and ".join(f"`method.{head}.{name}.{rest}`" for name in names)
            yield f"tune.grids: `{key}` is a key of {', '.join(names)}, and not the same in each; write {written}"
        if counting:
            continue
        owners = [name for name, (arm, _) in arms.items() if plain_key(key) in keys_of(arm) and _fits(arm, key)]
        if owners:
            yield f"tune.grids: `{key}` is set by every arm that has it ({', '.join(owners)}); remove it here or there"
            continue
        idle = [why for arm, _ in arms.values() if _fits(arm, key) and (why := _idle(arm, plain_key(key)))]
        if idle:
            yield f"tune.grids: no tuned arm has `{key}`: it means nothing with `{idle[0]}`"
        else:
            known = sorted(name for name in has if name.rpartition(".")[2] not in FIXED)
            yield f"tune.grids: no tuned arm has `{key}`{nearest(key, known)} Known: {', '.join(known)}"


def _owner(key: str) -> str | None:
    """`taid` of `method.approach.taid.start`."""
    parts = key.split(".")
    if len(parts) < 4 or parts[1] not in NAMED or parts[2] not in NAMED[parts[1]]:
        return None
    return parts[2]


def _name(arm: ResolvedArm, key: str) -> str | None:
    """Name of the arm's term that a key is of, if it is of one of which there are several."""
    parts = key.split(".")
    term = getattr(arm.method, parts[1], None) if len(parts) > 1 and parts[1] in NAMED else None
    return None if term is None else str(term.name)


def _fits(arm: ResolvedArm, key: str) -> bool:
    return _owner(key) in (None, _name(arm, key))


def _idle(arm: ResolvedArm, key: str) -> str:
    """Beside which of the arm's settings a key, or the block around it, means nothing; empty where it has a meaning."""
    beside = (why for path, why in idle_keys(arm.method, "method.") if f"{key}.".startswith(f"{path}."))
    return next(beside, "")


def _at(settings: Any, path: str) -> Any:
    for part in path.split("."):
        settings = settings[part] if isinstance(settings, Mapping) else getattr(settings, part)
    return settings
