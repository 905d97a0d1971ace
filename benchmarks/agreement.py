"""Nothing is timed that computes something else: equal loss and gradient norm in fp32, or no timings."""

from __future__ import annotations

from collections.abc import Mapping

from entkd.errors import UserError

TOLERANCE = 1e-3
"""Relative. entkd's teacher is stored in 16 bits, which alone changes a loss by about 1e-4."""


def relative_differences(found: Mapping[str, tuple[float, float]], reference: str) -> dict[str, tuple[float, float]]:
    """Of loss and gradient norm, to those of the reference."""
    loss, norm = found[reference]
    return {name: (abs(own[0] - loss) / loss, abs(own[1] - norm) / norm) for name, own in found.items()}


def assert_agreement(found: Mapping[str, tuple[float, float]], reference: str, tolerance: float = TOLERANCE) -> None:
    """Refuse competitors that do not train on the reference's loss.

    Parameters
    ----------
    found
        Name → loss (nats per response token) and gradient norm, on the same rows and weights, in fp32.
    reference
        Whose numbers are right.

    Raises
    ------
    UserError
        Naming all numbers that differ, NaN included.
    """
    problems = [
        f"{name}: {what} {own[index]:.6g}, but that of {reference} is {found[reference][index]:.6g}"
        for name, own in found.items()
        for index, what in enumerate(("loss", "gradient norm"))
        if not relative_differences(found, reference)[name][index] <= tolerance
    ]
    if problems:
        raise UserError("nothing is timed, since these do not compute the same:\n" + "\n".join(problems))
