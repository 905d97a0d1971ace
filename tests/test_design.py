"""The design of the factorial arms: complete, incomplete, or with two arms in one cell."""

from __future__ import annotations

import itertools

import pytest

from entkd.design import factorial_of, lacking
from entkd.errors import UserError
from entkd.names import COMPONENTS


def arms(*cells: str) -> list[dict[str, object]]:
    """Factorial arms, each from the initials of its components."""
    return [
        {"name": cell or "kd", "role": "factorial"} | {component: component[0] in cell for component in COMPONENTS}
        for cell in cells
    ]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (("", "c", "t", "ct"), ""),
        (("", "c", "t", "f", "ct", "cf", "tf", "ctf"), ""),
        ((), ""),
        (("", "c", "t"), "the factorial arms lack curriculum + temperature"),
        (("c", "t", "ct"), "the factorial arms lack no component"),
        (("", "c"), "the factorial arms vary curriculum; a design varies at least two"),
        (("c",), "the factorial arms vary no component; a design varies at least two"),
        (
            ("", "ctf"),
            "the factorial arms lack features, temperature, temperature + features, curriculum, "
            "curriculum + features, curriculum + temperature",
        ),
    ],
)
def test_what_an_incomplete_design_lacks(cells: tuple[str, ...], message: str) -> None:
    assert lacking(arms(*cells)) == message
    assert (factorial_of(arms(*cells)) is None) == (bool(message) or not cells)


def test_two_arms_in_a_cell_are_named() -> None:
    twice = [*arms("", "c", "t", "ct"), *arms("c")]
    twice[-1]["name"] = "again"
    for function in (factorial_of, lacking):
        with pytest.raises(UserError, match=r"arms.again.role: .* the cell `curriculum`, which arms.c already is"):
            function(twice)


def test_arms_follow_the_cells_in_any_order() -> None:
    for order in itertools.permutations(("", "c", "t", "ct")):
        design = factorial_of(arms(*order))
        assert design is not None
        assert design.arms == ("kd", "t", "c", "ct")
        assert design.primary == ["curriculum", "temperature", "ct-kd"]
