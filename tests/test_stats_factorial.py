"""entkd.stats.factorial against dummy-variable regression and numbers computed by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from fake_results import fake_settings
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from entkd.errors import UserError
from entkd.names import COMPONENTS
from entkd.stats import Factorial, factorial_effects, factorial_of

CELLS = list(itertools.product([0, 1], repeat=3))
DESIGN = Factorial(COMPONENTS, ("kd", "f", "t", "tf", "c", "cf", "ct", "full"))


def by_name(values_CS: np.ndarray) -> dict:
    return {effect.effect: effect for effect in factorial_effects(DESIGN, values_CS)}


def test_names() -> None:
    assert list(DESIGN.contrasts) == [
        "curriculum",
        "temperature",
        "features",
        "curriculum:temperature",
        "curriculum:features",
        "temperature:features",
        "curriculum:temperature:features",
        "full-kd",
    ]


def test_effects_by_hand() -> None:
    # y = 10 + 2 c + 5 f + 3 c f, and a seed effect: the mean of c on minus off is 2 + 3/2, of f 5 + 3/2,
    # switching c on adds 3 to the effect of f, of which the interaction is half; full − kd is 2 + 5 + 3.
    values_CS = np.array([[10 + 2 * c + 5 * f + 3 * c * f + s for s in (0, 7, -1)] for c, _, f in CELLS])
    effects = {name: effect.estimate for name, effect in by_name(values_CS).items()}
    expected = dict.fromkeys(DESIGN.contrasts, 0.0) | {
        "curriculum": 3.5,
        "features": 6.5,
        "curriculum:features": 1.5,
        "full-kd": 10.0,
    }
    assert effects == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
def test_error_and_tests_equal_regression_on_dummies(n_seeds: int) -> None:
    rng = np.random.default_rng(n_seeds)
    values_CS = rng.normal(0, 1, (8, n_seeds)) + rng.normal(0, 5, n_seeds)
    on_CF = np.repeat(np.array(CELLS), n_seeds, axis=0)
    codes = 2.0 * on_CF - 1
    products = [codes[:, list(f)].prod(1) for k in (1, 2, 3) for f in itertools.combinations(range(3), k)]
    seed_dummies = np.tile(np.eye(n_seeds), (8, 1))
    design = np.column_stack([*products, seed_dummies])
    y = values_CS.ravel()
    beta = np.linalg.lstsq(design, y, rcond=None)[0]
    df = y.size - design.shape[1]
    error = float(((y - design @ beta) ** 2).sum()) / df
    covariance = error * np.linalg.inv(design.T @ design)
    effects = by_name(values_CS)
    assert df == 7 * (n_seeds - 1) == effects["curriculum"].df
    for k, name in enumerate(list(DESIGN.contrasts)[:7]):  # an effect is twice the coefficient of its ±1 code
        se = 2 * math.sqrt(covariance[k, k])
        assert effects[name].estimate == pytest.approx(2 * beta[k])
        assert effects[name].p == pytest.approx(2 * stats.t.sf(abs(2 * beta[k]) / se, df))
        assert effects[name].high == pytest.approx(2 * beta[k] + stats.t.ppf(0.975, df) * se)
    full_minus_kd = values_CS[7].mean() - values_CS[0].mean()
    se = math.sqrt(2 * error / n_seeds)
    assert effects["full-kd"].estimate == pytest.approx(full_minus_kd)
    assert effects["full-kd"].low == pytest.approx(full_minus_kd - stats.t.ppf(0.975, df) * se)


@pytest.mark.parametrize("sign", [0, 1, -1])
@pytest.mark.parametrize("n_seeds", [2, 3])
def test_two_bases_equal_least_squares_with_seed_blocks(sign: int, n_seeds: int) -> None:
    """One row per run, columns for seeds and for every effect; a half has no column for what is aliased."""
    factors = (*COMPONENTS, "reverse_kl")
    cells = [c for c in itertools.product((-1, 1), repeat=4) if sign in (0, math.prod(c))]
    names = [f"arm{k}" for k in range(len(cells))]
    order = np.random.default_rng(9).permutation(len(cells))
    arms = [
        {"name": name, "role": "factorial", "base": "reverse_kl" if cell[3] > 0 else "forward_kl"}
        | {factor: code > 0 for factor, code in zip(COMPONENTS, cell, strict=False)}
        for name, cell in zip(names, cells, strict=True)
    ]
    first = next(k for k in order if cells[k][3] < 0)  # the base of the first arm is off
    design = factorial_of([arms[first], *(arms[k] for k in order if k != first)])
    assert design is not None
    assert design.sign == sign

    sets = [s for k in range(1, 5 if not sign else 3) for s in itertools.combinations(range(4), k)]
    if sign:
        sets = [s for s in sets if len(s) == 1 or 0 in s]
    rng = np.random.default_rng(n_seeds)
    y = rng.normal(0, 1, (len(cells), n_seeds)) + rng.normal(0, 5, n_seeds)
    x = np.array([[math.prod(cell[f] for f in s) for s in sets] for cell in cells], dtype=float)
    matrix = np.hstack([np.repeat(x, n_seeds, axis=0), np.tile(np.eye(n_seeds), (len(cells), 1))])
    beta, residual, rank, _ = np.linalg.lstsq(matrix, y.ravel(), rcond=None)
    df = y.size - int(rank)
    assert df == {16: 15, 8: 7}[len(cells)] * (n_seeds - 1)
    error = float(residual[0]) / df
    covariance = error * np.linalg.inv(matrix.T @ matrix)

    by_arm = dict(zip(names, y, strict=True))
    effects = {e.effect: e for e in factorial_effects(design, np.array([by_arm[arm] for arm in design.arms]))}
    assert len(effects) == len(sets) + (sign == 0)
    for k, chosen in enumerate(sets):
        name = ":".join(factors[f] for f in chosen)
        (found,) = [effect for key, effect in effects.items() if key.split(" = ")[0] == name]
        estimate, se = 2 * beta[k], 2 * math.sqrt(covariance[k, k])
        assert found.df == df
        assert found.estimate == pytest.approx(estimate)
        assert found.p == pytest.approx(2 * stats.t.sf(abs(estimate) / se, df))
        assert found.low == pytest.approx(estimate - stats.t.ppf(0.975, df) * se)
    if not sign:
        found = effects[design.full_minus_base]
        assert found.estimate == pytest.approx(
            y[cells.index((1, 1, 1, -1))].mean() - y[cells.index((-1, -1, -1, -1))].mean()
        )
        assert found.p == pytest.approx(2 * stats.t.sf(abs(found.estimate) / math.sqrt(2 * error / n_seeds), df))


def test_three_seeds_give_fourteen_degrees_of_freedom() -> None:
    assert by_name(np.random.default_rng(0).normal(0, 1, (8, 3)))["full-kd"].df == 14


def test_one_seed_gives_estimates_alone() -> None:
    effect = by_name(np.arange(8.0)[:, None])["curriculum"]
    assert effect.estimate == 4.0
    assert math.isnan(effect.p)
    assert math.isnan(effect.low)


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=3), st.integers(0, 99))
def test_what_a_seed_shares_among_the_cells_changes_nothing(shift_S: list[float], seed: int) -> None:
    values_CS = np.random.default_rng(seed).normal(0, 1, (8, 3))
    plain, shifted = by_name(values_CS), by_name(values_CS + np.array(shift_S))
    for name in DESIGN.contrasts:
        assert shifted[name].estimate == pytest.approx(plain[name].estimate, abs=1e-9)
        assert shifted[name].p == pytest.approx(plain[name].p, abs=1e-7)


def test_design_of_the_settings() -> None:
    design = factorial_of(fake_settings()["arms"])
    assert design is not None
    assert design.factors == COMPONENTS
    assert design.arms == (
        "kd",
        "features",
        "temperature",
        "temperature_features",
        "curriculum",
        "curriculum_features",
        "curriculum_temperature",
        "full",
    )
    assert [tuple(int(on) for on in cell) for cell in design.cells] == CELLS


def test_two_components_make_a_design_of_four_cells() -> None:
    arms = [arm for arm in fake_settings()["arms"] if not arm["temperature"]]
    design = factorial_of(arms)
    assert design == Factorial(("curriculum", "features"), ("kd", "features", "curriculum", "curriculum_features"))
    effects = factorial_effects(design, np.array([[1.0, 2], [3, 4], [6, 7], [10, 12]]))
    assert {effect.effect: effect.estimate for effect in effects} == pytest.approx(
        {"curriculum": 6.25, "features": 3.25, "curriculum:features": 1.25, "curriculum_features-kd": 9.5}
    )
    assert {effect.df for effect in effects} == {3}


def test_incomplete_designs_are_none() -> None:
    arms = fake_settings()["arms"]
    assert factorial_of([arm for arm in arms if arm["name"] != "features"]) is None
    assert factorial_of([arm for arm in arms if arm["name"] in ("kd", "full")]) is None
    assert factorial_of([arm for arm in arms if arm["name"] in ("kd", "curriculum")]) is None
    assert factorial_of([arm for arm in arms if arm["role"] != "factorial"]) is None


def test_two_arms_in_one_cell_are_refused() -> None:
    inverse = dict.fromkeys(COMPONENTS, "") | {"name": "inverse", "role": "factorial", "temperature": "c=-0.5"}
    with pytest.raises(UserError, match=r"arms\.inverse\.role.*`temperature`.*arms\.temperature.*control"):
        factorial_of([*fake_settings()["arms"], inverse])
