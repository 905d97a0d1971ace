"""The references of the published methods, against values by hand; numpy alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from references import components, methods, schedules
from references.formulas import SETTINGS, divergence, entropy, gradient, softmax

UNIFORM = [0.0, 0.0, 0.0, 0.0]
PEAKED = [60.0, 0.0, 0.0, 0.0]
"""One-hot to fp64: the other probabilities are e^-60."""


def logs(*probabilities):
    return [math.log(p) for p in probabilities]


def tokens(count, vocabulary=7, seed=0, spread=2.0):
    return spread * np.random.default_rng(seed).standard_normal((count, vocabulary))


def test_hellinger_by_hand():
    assert methods.hellinger(logs(0.9, 0.1), logs(0.5, 0.5)) == pytest.approx(
        math.sqrt(1 - math.sqrt(0.45) - math.sqrt(0.05))
    )
    assert methods.hellinger(PEAKED, PEAKED) == 0
    assert methods.hellinger(PEAKED, [0.0, 60.0, 0.0, 0.0]) == pytest.approx(1)
    assert methods.hellinger(PEAKED, UNIFORM) == methods.hellinger(UNIFORM, PEAKED) == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(
    ("share", "kept"), [(1.0, [0, 1, 2, 3]), (0.75, [1, 2, 3]), (0.74, [1, 3]), (0.5, [1, 3]), (0.1, [1])]
)
def test_adakd_keeps_the_largest_distances(share, kept):
    assert methods.adakd_kept([0.1, 0.9, 0.5, 0.7], share) == kept


def test_of_equal_distances_the_earlier_is_kept():
    assert methods.adakd_kept([0.5, 0.2, 0.5, 0.5], 0.5) == [0, 2]


def test_adakd_temperatures_by_hand():
    assert methods.adakd_temperatures([2.0, 1.0, 4.0]) == pytest.approx([1, math.exp(0.3), math.exp(-0.3)])
    lower = methods.adakd_temperatures([1.0, 2.0, 4.0, 8.0], c=1.0, base=3.0)
    assert lower == pytest.approx([3 * math.exp(-x) for x in (-0.6, 0, 0.6, 15 / 17)])
    middle = methods.adakd_temperatures([1.0, 3.0, 5.0, 8.0], c=1.0, median="mean")
    assert middle == pytest.approx([math.exp(-math.tanh(math.log(s / 4))) for s in (1, 3, 5, 8)])
    assert methods.adakd_temperatures([0.0, 2.0, 3.0]) == pytest.approx(
        [math.exp(0.5), 1, math.exp(-0.5 * math.tanh(math.log(1.5)))]
    )
    assert methods.adakd_temperatures([0.0, 0.0, 0.2]) == pytest.approx([1, 1, math.exp(-0.5)])


def test_adakd_without_temperatures_and_focus_is_plain_distillation():
    students, teachers = tokens(6), tokens(6, seed=1)
    plain = np.mean([divergence("reverse_kl", a, b) for a, b in zip(students, teachers, strict=True)])
    assert methods.adakd_loss(students, teachers, 1.0, c=0.0) == pytest.approx(plain)


def test_adakd_gradient_of_kept_tokens_with_the_temperatures_held():
    students, teachers = tokens(5), tokens(5, seed=1)
    distances = [methods.hellinger(a, b) for a, b in zip(students, teachers, strict=True)]
    kept = methods.adakd_kept(distances, 0.6)
    assert len(kept) == 3
    expected = np.zeros_like(students)
    temperatures = methods.adakd_temperatures([distances[i] for i in kept])
    for i, tau in zip(kept, temperatures, strict=True):
        expected[i] = tau * (softmax(students[i], tau) - softmax(teachers[i], tau)) / 3
    held = methods.difference(lambda z: methods.adakd_loss(z, teachers, 0.6, "forward_kl", frozen=students), students)
    assert held == pytest.approx(expected, abs=1e-8)
    free = methods.difference(lambda z: methods.adakd_loss(z, teachers, 0.6, "forward_kl"), students)
    assert np.abs(free - held).max() > 1e-3


@pytest.mark.parametrize("name", ["adaptive_kl", "todi"])
def test_weights_inside_a_divergence_are_held_too(name):
    student, teacher = tokens(1), tokens(1, seed=1)
    plain = gradient(name, student[0], teacher[0])
    adakd = methods.difference(lambda z: methods.adakd_loss(z, teacher, 1.0, name, frozen=student), student)
    assert adakd[0] == pytest.approx(plain, abs=1e-8)
    eakd = methods.difference(
        lambda z: methods.eakd_loss(z, teacher, normalise=True, name=name, frozen=student), student
    )
    assert eakd[0] == pytest.approx(plain, abs=1e-8)
    taid = methods.difference(lambda z: methods.taid_loss(z, teacher, 1.0, name, frozen=student), student)
    assert taid[0] == pytest.approx(plain, abs=1e-8)


def test_adakd_share_by_hand():
    shares = schedules.adakd_shares([1.0, 0.8, 0.85, 0.9, 2.0, 1.0], beta=0)
    assert shares == pytest.approx([1, 1, 0.9, 0.9, 0.99, 1, 0.9])
    # The averages are 1, 0.75 and 0.875; the last leaves the band around the second, the reference by then.
    assert schedules.adakd_shares([1.0, 0.5, 1.0], beta=0.5) == pytest.approx([1, 1, 0.9, 0.99])
    assert schedules.adakd_shares([1.0, 0.5, 0.5, 0.25], beta=0, warmup=2) == pytest.approx([1, 1, 1, 1, 0.9])


def test_adakd_reference_follows_triggers_or_changes():
    rising = [1.0, 2.0, 1.5]  # the share cannot rise above 1 at the second loss
    assert schedules.adakd_shares(rising, beta=0) == pytest.approx([1, 1, 1, 0.9])
    assert schedules.adakd_shares(rising, beta=0, reset="change") == pytest.approx([1, 1, 1, 1])


def test_adakd_share_is_bounded_below_in_the_release():
    falling = [0.5**n for n in range(40)]
    assert schedules.adakd_shares(falling, beta=0)[-1] == 0.1
    assert schedules.adakd_shares(falling, beta=0, floor=0.0)[-1] == pytest.approx(0.9**39)


@pytest.mark.parametrize(
    ("length", "share", "count"),
    [(0, 0.2, 0), (1, 0.2, 1), (5, 0.2, 1), (6, 0.2, 2), (10, 0.2, 2), (11, 0.2, 3), (100, 0.07, 7), (9, 1.0, 9)],
)
def test_sekd_count_is_rounded_up_per_sequence(length, share, count):
    assert methods.sekd_count(length, share) == count
    assert len(methods.sekd_selected([0.0] * length, share)) == count


def test_sekd_selects_the_highest_entropies():
    assert methods.sekd_selected([0.3, 0.1, 0.9, 0.2, 0.5, 0.4]) == [2, 4]
    assert methods.sekd_selected([0.3, 0.3, 0.3]) == [0]


def test_sekd_averages_and_entropies_by_hand():
    sure, unsure = logs(0.9, 0.1), logs(0.5, 0.5)
    # Five positions give one, ten give two. Students are unsure at the first ones, teachers at the last ones.
    students = [[unsure] + [sure] * 4, [unsure, unsure] + [sure] * 8]
    teachers = [[logs(0.8, 0.2)] + [sure] * 3 + [unsure], [logs(0.7, 0.3), sure] + [sure] * 6 + [unsure] * 2]

    def kl(p):
        return p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))

    assert methods.sekd_loss(students, teachers) == pytest.approx((kl(0.8) + kl(0.7) + kl(0.9)) / 3)
    sequences = methods.sekd_loss(students, teachers, average="sequences")
    assert sequences == pytest.approx((kl(0.8) + (kl(0.7) + kl(0.9)) / 2) / 2)
    by_teacher = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert methods.sekd_loss(students, teachers, by="teacher") == pytest.approx(by_teacher)
    pairs = zip([*students[0], *students[1]], [*teachers[0], *teachers[1]], strict=True)
    everything = [divergence("forward_kl", a, b) for a, b in pairs]
    assert methods.sekd_loss(students, teachers, share=1.0) == pytest.approx(np.mean(everything))


def test_eakd_weight_by_hand():
    assert methods.eakd_weight(UNIFORM, UNIFORM) == pytest.approx(math.log(4))
    assert methods.eakd_weight(PEAKED, UNIFORM) == pytest.approx(math.log(4) / 2)
    assert methods.eakd_weight(UNIFORM, PEAKED) == pytest.approx(0, abs=1e-10)
    assert methods.eakd_weight([0.0] * 2, [2 * x for x in logs(0.9, 0.1)]) == pytest.approx(entropy(logs(0.9, 0.1)))
    assert methods.eakd_weight([0.0] * 2, logs(0.9, 0.1), temperature=1.0) == pytest.approx(entropy(logs(0.9, 0.1)))


def test_eakd_normalisation():
    students, teachers = tokens(6), tokens(6, seed=1)
    weights = [methods.eakd_weight(a, b) for a, b in zip(students, teachers, strict=True)]
    losses = [divergence("forward_kl", a, b) for a, b in zip(students, teachers, strict=True)]
    assert methods.eakd_loss(students, teachers) == pytest.approx(np.mean(np.multiply(weights, losses)))
    assert methods.eakd_loss(students, teachers, normalise=True) == pytest.approx(
        np.dot(weights, losses) / sum(weights)
    )
    same = methods.eakd_loss([students[0]] * 3, [teachers[0]] * 3, normalise=True)
    assert same == pytest.approx(losses[0])
    sure = [[0.0, -math.inf], [-math.inf, 0.0]]
    assert methods.eakd_loss([[0.0, 0.0]] * 2, sure, normalise=True) == 0


def test_eakd_gradient_with_the_weights_held():
    students, teachers = tokens(3), tokens(3, seed=1)
    for normalise in (False, True):
        weights = [methods.eakd_weight(a, b) for a, b in zip(students, teachers, strict=True)]
        scale = np.mean(weights) if normalise else 1.0
        expected = [
            w / scale * 4 * (softmax(a, 4) - softmax(b, 4)) / 3
            for w, a, b in zip(weights, students, teachers, strict=True)
        ]
        found = methods.difference(
            lambda z, n=normalise: methods.eakd_loss(z, teachers, 2.0, 4.0, normalise=n, frozen=students), students
        )
        assert found == pytest.approx(np.array(expected), abs=1e-8)


def test_bdkd_weights_by_hand():
    sure, unsure = logs(0.9, 0.1), logs(0.5, 0.5)
    to_sure = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    to_unsure = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert methods.bdkd_token(sure, unsure) == pytest.approx(3 * to_sure + to_unsure)
    assert methods.bdkd_token(unsure, sure) == pytest.approx(to_unsure + 3 * to_sure)
    assert methods.bdkd_token(sure, unsure, divide=True) == pytest.approx((3 * to_sure + to_unsure) / 4)
    assert methods.bdkd_token(sure, unsure, weight=2.0, divide=True) == pytest.approx((2 * to_sure + to_unsure) / 3)
    ported = methods.bdkd_token(sure, unsure, forward="cross_entropy")
    assert ported == pytest.approx(3 * (to_sure + math.log(2)) + to_unsure)
    assert methods.bdkd_token(sure, sure) == 0
    assert methods.bdkd_loss([sure, sure], [unsure, sure]) == pytest.approx((3 * to_sure + to_unsure) / 2)


def test_bdkd_at_equal_entropies():
    one, other = logs(0.9, 0.1), logs(0.1, 0.9)
    distance = 0.8 * math.log(9)
    assert methods.bdkd_token(one, other) == pytest.approx(4 * distance)
    assert methods.bdkd_token(one, other, ties="neither") == pytest.approx(2 * distance)


def test_taid_between_student_and_teacher():
    students, teachers = tokens(4), tokens(4, seed=1)
    assert methods.taid_loss(students, teachers, 0.0) == pytest.approx(0, abs=1e-12)
    own = np.mean([entropy(z) for z in students])
    assert methods.taid_loss(students, teachers, 0.0, variant="authors") == pytest.approx(own)
    plain = [divergence("forward_kl", a, b) for a, b in zip(students, teachers, strict=True)]
    assert methods.taid_loss(students, teachers, 1.0) == pytest.approx(np.mean(plain))
    # A geometric mean of (0.8, 0.2) and (0.5, 0.5) is (2, 1) / 3.
    half = methods.taid_loss([logs(0.5, 0.5)], [logs(0.8, 0.2)], 0.5)
    assert half == pytest.approx(2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3))


@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_taid_gradient_with_the_target_held(variant):
    students, teachers = tokens(3), tokens(3, seed=1)
    targets = [methods.taid_target(a, b, 0.4) for a, b in zip(students, teachers, strict=True)]
    expected = [(softmax(a) - softmax(b)) / 3 for a, b in zip(students, targets, strict=True)]
    found = methods.difference(
        lambda z: methods.taid_loss(z, teachers, 0.4, variant=variant, frozen=students), students
    )
    assert found == pytest.approx(np.array(expected), abs=1e-8)


def test_taid_linear_times():
    times = schedules.taid_times([3.0, 5.0, 1.0, 1.0], 4, adaptive=False)
    assert times == pytest.approx([0.4, 0.4, 0.55, 0.7, 0.85])


def test_taid_adaptive_step_by_hand():
    t, momentum = schedules.taid_step(0.4, 0.0, previous=2.0, loss=1.0, linear=0.0)
    assert momentum == pytest.approx(0.005)
    assert t == pytest.approx(0.4 + 5e-4 * 0.6 / (1 + math.exp(-0.005)))
    assert schedules.taid_step(0.4, 0.0, 2.0, 1.0, linear=0.7)[0] == 0.7
    assert schedules.taid_step(0.4, 0.0, 2.0, 1.0, linear=0.7, t_end=0.6)[0] == 0.6
    assert schedules.taid_times([2.0, 1.0], 10**9)[:2] == [0.4, 0.4]


def test_taid_times_rise_between_their_bounds():
    losses = np.random.default_rng(0).uniform(0.1, 9, 200)
    times = np.array(schedules.taid_times(losses, 200, alpha=0.05))
    linear = np.array(schedules.taid_times(losses, 200, adaptive=False))
    assert (np.diff(times) >= 0).all()
    assert (times >= linear).all()
    assert times.max() <= 1
    falling = schedules.taid_times([2.0**-n for n in range(50)], 10**9)
    rising = schedules.taid_times([2.0**n for n in range(50)], 10**9)
    assert falling[-1] > rising[-1] > 0.4


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("scale", ["per_token", "linear", "off"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 15.6])
def test_ctkd_slope_by_central_differences(name, scale, temperature):
    students, teachers = tokens(4), tokens(4, seed=1)
    options = {"name": name, "scale": scale}
    step = 1e-5 * temperature
    up = methods.ctkd_loss(students, teachers, temperature + step, **options)
    down = methods.ctkd_loss(students, teachers, temperature - step, **options)
    found = methods.ctkd_slope(students, teachers, temperature, **options)
    assert found == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-8)
    assert methods.ctkd_slope(students, students, temperature, **options) == pytest.approx(0, abs=1e-12)


def test_ctkd_slope_of_two_words_by_hand():
    # q is even at every T; p = σ(x / T), x = log 4: KL = log 2 - H(p), dH/dT = Var_p(z) / T³ = p (1 - p) x² / T³.
    x = math.log(4)
    assert methods.ctkd_slope([[0.0, 0.0]], [[x, 0.0]], 1.0, scale="off") == pytest.approx(-0.8 * 0.2 * x**2)
    assert methods.ctkd_slope([[x, 0.0]], [[0.0, 0.0]], 1.0, "reverse_kl", "off") == pytest.approx(-0.8 * 0.2 * x**2)


def test_ctkd_temperature_and_strength():
    assert methods.ctkd_temperature(1.0) == pytest.approx(15.62, abs=0.005)
    assert methods.ctkd_temperature(0.0) == 11
    assert [schedules.ctkd_strength(x, 10) for x in (-1, 0, 5, 10, 99)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert schedules.ctkd_strength(1, 10) == pytest.approx(0.0245, abs=5e-5)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("scale", ["per_token", "linear", "off"])
def test_ctkd_descent_along_theta_raises_the_loss(name, scale):
    students, teachers = tokens(4), tokens(4, seed=1)

    def loss(theta):
        return methods.ctkd_loss(students, teachers, methods.ctkd_temperature(theta, 0.5, 8.0), name, scale)

    gradient = methods.ctkd_gradient(students, teachers, -1.0, 0.25, 0.5, 8.0, name=name, scale=scale)
    assert gradient == pytest.approx(-0.25 * (loss(-1 + 1e-5) - loss(-1 - 1e-5)) / 2e-5, rel=1e-6)
    assert loss(-1 - 0.01 * gradient) > loss(-1)


def test_distillm_thresholds_by_hand():
    losses = [2.0, 1.5, 2.0, 2.125, 2.125, 2.25, 1.0]
    authors = schedules.distillm_thresholds(losses, epsilon=0.125)
    assert authors == pytest.approx([0, 0, 0, 0.1, 0.1, 0.2, 0.2])
    paper = schedules.distillm_thresholds(losses, epsilon=0.125, variant="paper")
    assert paper == pytest.approx([0, 0, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert schedules.distillm_thresholds(range(20), initial=0.5)[-1] == 1


def test_distillm_shares_over_a_run():
    assert schedules.distillm_fresh(0.4, 0, 10) == 0.4
    assert schedules.distillm_fresh(0.4, 5, 10) == pytest.approx(0.2)
    assert schedules.distillm_fresh(0.4, 10, 10) == 0
    assert schedules.distillm_fresh(0.4, 10, 10, "increasing") == 0.4
    assert schedules.distillm_fresh(0.4, 1, 10, "constant") == 0.2


def test_distillm_sources():
    table = {0.1: (True, "student"), 0.3: (False, "buffer"), 0.4: (False, "data"), 0.9: (False, "data")}
    for draw, expected in table.items():
        assert schedules.distillm_source(draw, 0.4, 0.2, full=True) == expected
    assert schedules.distillm_source(0.3, 0.4, 0.2, full=False) == (True, "student")
    assert schedules.distillm_source(0.4, 0.4, 0.2, full=False) == (False, "data")
    assert schedules.distillm_source(0.1, 0.4, 0.2, full=True, variant="paper") == (True, "buffer")
    assert schedules.distillm_source(0.0, 0.0, 0.0, full=False) == (False, "data")


def test_gkd_share():
    draws = np.random.default_rng(0).uniform(size=2000)
    mean, deviation = schedules.gkd_count(0.3, 2000)
    assert mean == pytest.approx(600)
    assert deviation == pytest.approx(math.sqrt(420))
    assert abs(sum(schedules.gkd_source(u, 0.3) == "student" for u in draws) - mean) < 4 * deviation
    assert {schedules.gkd_source(u, 0.0) for u in draws} == {"data"}
    assert {schedules.gkd_source(u, 1.0) for u in draws} == {"student"}


CLOSED = [("jsd", {}), ("jsd", {"beta": 0.2}), ("skew_kl", {"alpha": 0.4})]


@pytest.mark.parametrize(("name", "settings"), [case for case in CLOSED if case[0] in SETTINGS])
def test_closed_gradients_by_central_differences(name, settings):
    student, teacher = tokens(2)
    assert components.slope(name, student, teacher, **settings) == pytest.approx(
        gradient(name, student, teacher, **settings)
    )


def test_cross_entropy_by_hand_and_by_central_differences():
    students, labels = tokens(4), [0, 3, 6, 3]
    value, found = components.cross_entropy([logs(0.5, 0.5), logs(0.8, 0.2)], [1, 0])
    assert value == pytest.approx((math.log(2) - math.log(0.8)) / 2)
    assert found == pytest.approx(np.array([[0.25, -0.25], [-0.1, 0.1]]))
    numeric = methods.difference(lambda z: components.cross_entropy(z, labels)[0], students)
    assert components.cross_entropy(students, labels)[1] == pytest.approx(numeric, abs=1e-9)


def test_features_by_hand_and_by_central_differences():
    turned = np.array([[0.0, 1.0], [-1.0, 0.0]])
    value, _, _ = components.features([[[1.0, 0.0], [3.0, 4.0]]], [[[9.0, 9.0], [4.0, 3.0]]], [np.eye(2)], [0.2, 0.9])
    assert value == pytest.approx(1 - 24 / 25)
    value, _, _ = components.features(np.ones((1, 2, 2)), [[[1.0, 0.0]] * 2], [turned], [0.9, 0.9])
    assert value == pytest.approx(1 - math.sqrt(0.5))
    states, targets, maps = tokens(3, 4)[None], tokens(3, 5, seed=1)[None], tokens(5, 4, seed=2)[None]
    d = [0.9, 0.1, 0.85]
    _, by_state, by_map = components.features(states, targets, maps, d)
    numeric = methods.difference(lambda x: components.features(x, targets, maps, d)[0], states)
    assert by_state[0] == pytest.approx(numeric[0], abs=1e-9)
    numeric = methods.difference(lambda w: components.features(states, targets, w, d)[0], maps)
    assert by_map[0] == pytest.approx(numeric[0], abs=1e-9)


def test_weights_and_temperatures_by_hand():
    sure, unsure, even = logs(0.9, 0.1), logs(0.6, 0.4), logs(0.5, 0.5)
    d = components.difficulties([sure, even, unsure, even])
    assert d == pytest.approx([1 / 8, 3 / 4, 3 / 8, 3 / 4])
    raw = np.array([1 - 0.36, 1 + 0.24, 1 - 0.12, 1 + 0.24])  # 0.8 · 0.6 · (2 d - 1)
    assert components.curriculum(d, 0.8) == pytest.approx(raw / 1.0)
    assert components.temperatures([0.0, 0.5, 1.0], base=2.0) == pytest.approx(
        [2 / math.sqrt(math.e), 2, 2 * math.sqrt(math.e)]
    )
    value, _ = components.distillation("forward_kl", [even], [sure], np.array([3.0]), np.array([2.0]))
    assert value == pytest.approx(12 * divergence("forward_kl", even, sure, 2.0))
