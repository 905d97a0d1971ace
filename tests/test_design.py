"""The design of the factorial arms: complete, incomplete, or with two arms in one cell."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entkd.design import Factorial, factorial_of, lacking
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


FOUR = (*COMPONENTS, "reverse_kl")
SUBSETS = tuple("".join(initials) for size in range(4) for initials in itertools.combinations("ctf", size))


def on(base: str, *cells: str) -> list[dict[str, object]]:
    """Factorial arms on a base, named by its initial and those of their components."""
    return [arm | {"name": f"{base[0]}_{cell}", "base": base} for cell, arm in zip(cells, arms(*cells), strict=True)]


def half(sign: int) -> list[dict[str, object]]:
    """The arms with an even (sign +1) or odd number of factors on, counted here by their names."""
    even, odd = ([cell for cell in SUBSETS if len(cell) % 2 == parity] for parity in (0, 1))
    forward, reverse = (even, odd) if sign > 0 else (odd, even)
    return on("forward_kl", *forward) + on("reverse_kl", *reverse)


def two_bases() -> list[dict[str, object]]:
    return on("forward_kl", *SUBSETS) + on("reverse_kl", *SUBSETS)


def design_of(arms: list[dict[str, object]]) -> Factorial:
    design = factorial_of(arms)
    assert design is not None
    assert lacking(arms) == ""
    return design


def test_the_base_is_a_factor_where_there_are_two() -> None:
    design = design_of(two_bases())
    assert design.factors == FOUR
    assert (design.components, design.bases, design.sign) == (COMPONENTS, ("forward_kl", "reverse_kl"), 0)
    assert design.ends == ("f_ctf", "f_")
    assert design.primary == [*COMPONENTS, "f_ctf-f_"]
    for cell, arm in zip(design.cells, design.arms, strict=True):
        base, initials = arm.split("_")
        assert dict(zip(FOUR, cell, strict=True)) == {c: c[0] in initials for c in COMPONENTS} | {
            "reverse_kl": base == "r"
        }


def test_two_components_on_two_bases() -> None:
    design = design_of(on("forward_kl", "", "c", "t", "ct") + on("reverse_kl", "", "c", "t", "ct"))
    assert design.factors == ("curriculum", "temperature", "reverse_kl")
    assert design.primary == ["curriculum", "temperature", "f_ct-f_"]


def test_the_base_of_the_first_arm_is_off() -> None:
    later = two_bases()[1:]
    random.Random(0).shuffle(later)
    assert design_of([two_bases()[0], *later]) == design_of(two_bases())
    swapped = design_of(two_bases()[::-1])
    assert swapped.factors[-1] == "forward_kl"
    assert swapped.ends == ("r_ctf", "r_")


@pytest.mark.parametrize(
    ("bases", "name"),
    [
        (("jsd", "todi"), "todi"),
        (("forward_kl", "forward_kl weight=2.0"), "base"),
        (("jsd beta=0.2", "jsd beta=0.8"), "base"),
        (("forward_kl + ce", "forward_kl"), "base"),
    ],
)
def test_name_of_the_base_as_a_factor(bases: tuple[str, str], name: str) -> None:
    both = [arm | {"name": f"{k}{arm['name']}", "base": base} for k, base in enumerate(bases) for arm in arms("", "c")]
    assert design_of(both).factors == ("curriculum", name)
    assert design_of(both).bases == bases


@pytest.mark.parametrize("sign", [1, -1])
def test_a_half_fraction_is_recognised(sign: int) -> None:
    design = design_of(half(sign))
    assert (design.sign, len(design.arms), design.factors) == (sign, 8, FOUR)
    minus = "-" if sign < 0 else ""
    assert design.relation == f"I = {minus}curriculum:temperature:features:reverse_kl"
    assert list(design.contrasts) == [
        *FOUR,
        f"curriculum:temperature = {minus}features:reverse_kl",
        f"curriculum:features = {minus}temperature:reverse_kl",
        f"curriculum:reverse_kl = {minus}temperature:features",
    ]
    assert (design.ends, design.full_minus_base) == (None, None)
    assert design.primary == list(COMPONENTS)


def test_contrasts_are_orthogonal_and_sum_to_zero() -> None:
    for arms_ in (two_bases(), half(1), half(-1)):
        design = design_of(arms_)
        rows = [row for name, row in design.contrasts.items() if name != design.full_minus_base]
        assert len(rows) == len(design.arms) - 1
        assert all(sum(row) == 0 for row in rows)
        assert all(sum(a * b for a, b in zip(*pair, strict=True)) == 0 for pair in itertools.combinations(rows, 2))


@given(st.lists(st.integers(-99, 99), min_size=16, max_size=16))
def test_a_contrast_is_its_effect_and_what_is_aliased_with_it(sizes: list[int]) -> None:
    """Scores made of all 16 effects: the complete design finds each, a half the sum with its complement's, signed."""
    sets = [":".join(s) for size in range(5) for s in itertools.combinations(FOUR, size)]
    true = dict(zip(sets, sizes, strict=True))

    def score(arm: str) -> float:
        """Half of each effect, with the product of its factors' ±1 codes."""
        base, initials = arm.split("_")
        code = {c: 1 if c[0] in initials else -1 for c in COMPONENTS} | {"reverse_kl": 1 if base == "r" else -1}
        total = 0.0
        for effect, size in true.items():
            sign = 1
            for factor in effect.split(":") if effect else ():
                sign *= code[factor]
            total += sign * size / 2
        return total

    for arms_ in (two_bases(), half(1), half(-1)):
        design = design_of(arms_)
        for name, row in design.contrasts.items():
            found = sum(k * score(arm) for k, arm in zip(row, design.arms, strict=True))
            if name == design.full_minus_base:
                assert found == pytest.approx(score("f_ctf") - score("f_"), abs=1e-9)
                continue
            effect, _, pair = name.partition(" = ")
            others = ":".join(factor for factor in FOUR if factor not in effect.split(":"))
            assert not pair or pair.lstrip("-") == others
            assert found == pytest.approx(true[effect] + design.sign * true[others], abs=1e-9)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            two_bases()[:-1],
            "the factorial arms lack curriculum + temperature + features on reverse_kl; for the half fraction I = "
            "-curriculum:temperature:features:reverse_kl f_, f_ct, f_cf, f_tf, r_c, r_t, r_f must have another role",
        ),
        (
            half(1)[:-1] + on("reverse_kl", ""),
            "the factorial arms lack features on forward_kl, temperature on forward_kl, "
            "temperature + features on reverse_kl, curriculum on forward_kl, curriculum + features on reverse_kl, "
            "curriculum + temperature on reverse_kl, curriculum + temperature + features on forward_kl, curriculum + "
            "temperature + features on reverse_kl; for the half fraction I = "
            "curriculum:temperature:features:reverse_kl they lack curriculum + temperature + features on reverse_kl "
            "and r_ must have another role",
        ),
        (on("forward_kl", "", "ct") + on("reverse_kl", "c", "t"), ""),
        (
            on("forward_kl", "", "c") + on("reverse_kl", ""),
            "the factorial arms lack curriculum on reverse_kl",
        ),
        (on("forward_kl", "") + on("reverse_kl", ""), "the factorial arms vary reverse_kl; a design varies at least"),
    ],
)
def test_what_neither_a_complete_design_nor_a_half_has(cells: list[dict[str, object]], message: str) -> None:
    """The third set is a half of 2³: main effects would be aliased with two-factor interactions, so it is no design."""
    assert factorial_of(cells) is None
    if message:
        assert lacking(cells).startswith(message)
    else:
        assert lacking(cells).count(" on ") == 4
        assert "half" not in lacking(cells)


def test_three_bases_are_refused() -> None:
    third = on("forward_kl", "") + on("jsd", "c") + on("tvd", "t")
    for function in (factorial_of, lacking):
        with pytest.raises(UserError, match=r"arms.t_t.role: .* `tvd`, beside arms on `forward_kl` and `jsd`; .*base"):
            function(third)


def test_a_cell_that_is_there_twice_says_its_base() -> None:
    twice = [*two_bases(), two_bases()[-1] | {"name": "again"}]
    with pytest.raises(
        UserError, match=r"the cell `curriculum \+ temperature \+ features on reverse_kl`, which arms.r_"
    ):
        factorial_of(twice)
