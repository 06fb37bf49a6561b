"""Intervals cover, tests keep their level, and both agree with SciPy and with exact values."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import scipy.stats

from jaxmerge.scores import stats
from jaxmerge.scores.objective import AGGREGATES, Objective, define

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
WEIGHTED = define(list(WEIGHTS), list(WEIGHTS.values()), "weighted")
ALONE = define(["a"])
SIZES = {"a": 300, "b": 120, "c": 60}
CHANCES = {"a": 0.6, "b": 0.35, "c": 0.8}


def draw(rng: np.random.Generator, *, few_values: bool = True) -> dict[str, np.ndarray]:
    """Scores with the means of CHANCES: 0 and 1, or any between."""
    if few_values:
        return {t: (rng.random(n) < CHANCES[t]).astype(float) for t, n in SIZES.items()}
    return {t: rng.beta(2 * CHANCES[t], 2 * (1 - CHANCES[t]), n) for t, n in SIZES.items()}


def means(samples: dict[str, np.ndarray]) -> dict[str, float]:
    return {task: float(x_N.mean()) for task, x_N in samples.items()}


def objective(aggregate: str) -> Objective:
    """Over the three tasks, measured by a pool whose best and worst are 0.3 apart."""
    weights = list(WEIGHTS.values()) if AGGREGATES[aggregate].weights != "refused" else ()
    best = {task: chance + 0.1 for task, chance in CHANCES.items()}
    worst = {task: chance - 0.2 for task, chance in CHANCES.items()}
    return define(list(SIZES), weights, aggregate).measured_by([best, worst])


@pytest.mark.parametrize("few_values", [True, False])
def test_interval_covers_the_truth(few_values: bool) -> None:
    rng = np.random.default_rng(1)
    truth = sum(WEIGHTS[task] * CHANCES[task] for task in WEIGHTS)
    simulations, hits, misses_below = 300, 0, 0
    for seed in range(simulations):
        samples = draw(rng, few_values=few_values)
        low, high = stats.interval(samples, WEIGHTED, resamples=1000, seed=seed)
        hits += low <= truth <= high
        misses_below += truth < low
    # The percentile interval of 480 examples covers 94% to 95%; these are the 1e-4 and 1 - 1e-4
    # quantiles of binomial(300, 0.94) and (300, 0.95): 264 and 298.
    least = scipy.stats.binom.ppf(1e-4, simulations, 0.94)
    most = scipy.stats.binom.ppf(1 - 1e-4, simulations, 0.95)
    assert least <= hits <= most
    assert 0 < misses_below < simulations - hits  # it misses on both sides


@pytest.mark.parametrize("few_values", [True, False])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_interval_of_one_task_is_that_of_scipy(few_values: bool, confidence: float) -> None:
    x_N = draw(np.random.default_rng(2), few_values=few_values)["a"]
    low, high = stats.interval({"a": x_N}, ALONE, confidence=confidence)
    expected = scipy.stats.bootstrap(
        (x_N,),
        np.mean,
        n_resamples=10_000,
        confidence_level=confidence,
        method="percentile",
        batch=1000,
        rng=np.random.default_rng(3),
    ).confidence_interval
    # The standard error of a 2.5% quantile from 10,000 draws is 0.027 standard errors of the mean;
    # five of them for the difference of two such quantiles.
    tolerance = 5 * np.sqrt(2) * 0.027 * x_N.std() / np.sqrt(x_N.size)
    assert abs(low - expected.low) < tolerance
    assert abs(high - expected.high) < tolerance


def test_interval_resamples_within_tasks() -> None:
    # All scores of a task are equal: nothing can vary, however much the tasks differ.
    samples = {"a": np.ones(30), "b": np.zeros(30), "c": np.full(30, 0.5)}
    assert stats.interval(samples, WEIGHTED) == pytest.approx((0.6, 0.6))


def test_interval_does_not_depend_on_the_order_of_tasks() -> None:
    samples = draw(np.random.default_rng(4))
    turned = dict(reversed(samples.items()))
    assert stats.interval(samples, WEIGHTED) == stats.interval(turned, WEIGHTED)
    assert stats.interval(samples, WEIGHTED) != stats.interval(samples, WEIGHTED, seed=1)


def test_paired_p_is_uniform_under_the_null() -> None:
    # Half of the answers are shared, so that pairing matters.
    rng = np.random.default_rng(5)
    p_S, inside = [], 0
    for seed in range(300):
        shared, a, b = (draw(rng, few_values=False) for _ in range(3))
        either = {task: rng.random(n) < 0.5 for task, n in SIZES.items()}
        compared = stats.paired(
            {task: np.where(either[task], shared[task], a[task]) for task in SIZES},
            {task: np.where(either[task], shared[task], b[task]) for task in SIZES},
            WEIGHTED,
            resamples=500,
            seed=seed,
        )
        p_S.append(compared.p)
        inside += compared.low <= 0 <= compared.high
    # A uniform p fails this once in 1,000 seeds; the seed is fixed.
    assert scipy.stats.kstest(p_S, "uniform").pvalue > 1e-3
    assert scipy.stats.binom.ppf(1e-4, 300, 0.94) <= inside


def test_paired_finds_a_shift() -> None:
    rng = np.random.default_rng(6)
    b = draw(rng)
    a = {task: np.where(rng.random(x_N.size) < 0.2, 1.0, x_N) for task, x_N in b.items()}
    compared = stats.paired(a, b, WEIGHTED)
    assert compared.delta == pytest.approx(WEIGHTED.of(means(a)) - WEIGHTED.of(means(b)))
    assert 0 < compared.low < compared.delta < compared.high
    assert compared.p == 1 / 10_001  # never 0
    turned = stats.paired(b, a, WEIGHTED)
    assert turned.delta == -compared.delta
    assert turned.p == compared.p
    assert turned.low < turned.delta < turned.high < 0


def test_paired_p_is_that_of_all_sign_vectors() -> None:
    # Eleven examples, some differences equal and one 0, in two tasks of different weight.
    a = {"a": np.array([1, 1, 0.5, 1, 1, 0, 0.8]), "b": np.array([1, 0, 1, 0.1])}
    b = {"a": np.array([0, 0, 0.5, 1, 0, 1, 0.5]), "b": np.array([0, 1, 0, 0.4])}
    weights = {"a": 0.7, "b": 0.3}
    terms_N = np.concatenate([weights[t] * (a[t] - b[t]) / a[t].size for t in weights])
    totals_S = [np.dot(signs, terms_N) for signs in itertools.product([-1, 1], repeat=11)]
    exact = float(np.mean(np.abs(totals_S) >= abs(terms_N.sum()) - 1e-12))
    p = stats.paired(a, b, define("ab", (0.7, 0.3), "weighted"), resamples=20_000).p
    assert 0.1 < exact < 0.9
    # Five standard errors of a share among 20,000 draws.
    assert p == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 20_000))


def test_paired_p_is_that_of_scipy() -> None:
    rng = np.random.default_rng(7)
    a, b = draw(rng, few_values=False)["a"], draw(rng, few_values=False)["a"]
    p = stats.paired({"a": a}, {"a": b}, ALONE).p
    expected = scipy.stats.permutation_test(
        (a - b,),
        np.mean,
        permutation_type="samples",
        n_resamples=10_000,
        batch=1000,
        rng=np.random.default_rng(8),
    ).pvalue
    # Five standard errors of the difference of two shares among 10,000 draws.
    assert p == pytest.approx(expected, abs=5 * math.sqrt(2 * expected * (1 - expected) / 10_000))


def test_equal_models_do_not_differ() -> None:
    samples = draw(np.random.default_rng(9))
    assert stats.paired(samples, samples, WEIGHTED) == stats.Comparison(0.0, 0.0, 0.0, 1.0)


def test_wrong_samples_are_refused() -> None:
    samples = draw(np.random.default_rng(10))
    with pytest.raises(ValueError, match=r"\['a', 'b', 'c'\].*\['a'\]"):
        stats.interval(samples, ALONE)
    with pytest.raises(ValueError, match="task b"):
        stats.interval({**samples, "b": np.array([0.5, np.nan])}, WEIGHTED)
    with pytest.raises(ValueError, match="task c"):
        stats.interval({**samples, "c": np.array([])}, WEIGHTED)
    with pytest.raises(ValueError, match="300 and 299"):
        stats.paired(samples, {**samples, "a": samples["a"][1:]}, WEIGHTED)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("few_values", [True, False])
def test_interval_of_any_aggregate_is_that_of_resampling(aggregate: str, few_values: bool) -> None:
    """Against the same written out with loops over resamples and draws of its own."""
    samples, rng = draw(np.random.default_rng(11), few_values=few_values), np.random.default_rng(12)
    target = objective(aggregate)
    value = target.of(means(samples))
    values_R = [
        target.of({t: float(rng.choice(x_N, x_N.size).mean()) for t, x_N in samples.items()})
        for _ in range(2000)
    ]
    low, high = np.quantile(values_R, [0.025, 0.975])
    if aggregate in ("worst", "chebyshev"):
        low, high = 2 * value - high, 2 * value - low
    found = stats.interval(samples, target)
    # The standard error of a 2.5% quantile from 2,000 draws is 0.06 standard deviations of a normal
    # distribution, and 0.027 from the other's 10,000; five of the two together.
    assert found == pytest.approx((low, high), abs=5 * 0.066 * float(np.std(values_R)))


@pytest.mark.parametrize("aggregate", ["worst", "normalised", "chebyshev"])
def test_interval_of_any_aggregate_covers_the_truth(aggregate: str) -> None:
    rng = np.random.default_rng(13)
    target = objective(aggregate)
    truth, hits = target.of(CHANCES), 0
    for seed in range(300):
        low, high = stats.interval(draw(rng), target, resamples=1000, seed=seed)
        hits += low <= truth <= high
    # 1,500 other simulations covered in 94% for worst and normalised, and in 87% for chebyshev,
    # where the three gains tie. The bounds are the 1e-4 and 1 - 1e-4 quantiles of
    # binomial(300, 0.87) and (300, 0.95): 238 and 298.
    least, most = (0.87, 0.95) if aggregate == "chebyshev" else (0.94, 0.95)
    assert scipy.stats.binom.ppf(1e-4, 300, least) <= hits
    assert hits <= scipy.stats.binom.ppf(1 - 1e-4, 300, most)


@pytest.mark.parametrize("aggregate", ["worst", "normalised", "chebyshev"])
def test_paired_level_and_power_under_any_aggregate(aggregate: str) -> None:
    rng = np.random.default_rng(14)
    target, p_S, inside, found = objective(aggregate), [], 0, 0
    for seed in range(300):
        shared, a, b = (draw(rng) for _ in range(3))
        either = {task: rng.random(n) < 0.5 for task, n in SIZES.items()}
        a = {task: np.where(either[task], shared[task], a[task]) for task in SIZES}
        b = {task: np.where(either[task], shared[task], b[task]) for task in SIZES}
        compared = stats.paired(a, b, target, resamples=500, seed=seed)
        p_S.append(compared.p)
        inside += compared.low <= 0 <= compared.high
        better = {task: np.where(rng.random(n) < 0.4, 1.0, b[task]) for task, n in SIZES.items()}
        found += stats.paired(better, b, target, resamples=500, seed=seed).p < 0.05
    rejected = sum(p < 0.05 for p in p_S)
    # The 1e-4 and 1 - 1e-4 quantiles of binomial(300, 0.05): 3 and 31.
    assert (
        scipy.stats.binom.ppf(1e-4, 300, 0.05)
        <= rejected
        <= scipy.stats.binom.ppf(0.9999, 300, 0.05)
    )
    assert scipy.stats.binom.ppf(1e-4, 300, 0.92) <= inside
    assert found > 0.9 * 300  # 0.4 of the wrong answers mended, on each task


def test_paired_p_of_any_aggregate_is_that_of_all_swaps() -> None:
    """Nine examples of two tasks: every way to swap the models' scores, aggregated by hand."""
    a = {"a": np.array([1.0, 1, 0, 1, 1]), "b": np.array([1.0, 0, 1, 0.1])}
    b = {"a": np.array([0.0, 1, 1, 0, 0]), "b": np.array([0.0, 1, 0, 0.4])}
    deltas = []
    for swapped in itertools.product([False, True], repeat=9):
        one = np.where(swapped, np.concatenate([*b.values()]), np.concatenate([*a.values()]))
        two = np.where(swapped, np.concatenate([*a.values()]), np.concatenate([*b.values()]))
        deltas.append(min(one[:5].mean(), one[5:].mean()) - min(two[:5].mean(), two[5:].mean()))
    exact = float(np.mean(np.abs(deltas) >= abs(deltas[0]) - 1e-12))
    compared = stats.paired(a, b, define("ab", (), "worst"), resamples=20_000)
    assert compared.delta == pytest.approx(deltas[0])
    assert 0.1 < exact < 0.9
    # Five standard errors of a share among 20,000 draws.
    assert compared.p == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 20_000))


def test_statistics_of_a_thousand_examples_are_quick() -> None:
    """It takes a hundredth of this; a loop over resamples would take more."""
    rng = np.random.default_rng(15)
    a, b = ({task: (rng.random(1000) < 0.5).astype(float) for task in SIZES} for _ in range(2))
    started = time.perf_counter()
    stats.interval(a, objective("chebyshev"))
    stats.paired(a, b, objective("chebyshev"))
    assert time.perf_counter() - started < 3


def test_an_interval_of_any_number_of_several_models():
    """Of a mean it is that of `interval`; equal models make the interval of one."""
    rng = np.random.default_rng(0)
    a = {"x": (rng.random(400) < 0.6).astype(float), "y": (rng.random(300) < 0.3).astype(float)}
    low, high = stats.interval_of([a], "xy", lambda means: means.mean(), resamples=10_000)
    expected = stats.interval(a, define("xy"))
    np.testing.assert_allclose([low, high], expected, atol=0.004)  # of other draws
    of_two = stats.interval_of([a, a], "xy", lambda means: means.max(axis=0).mean())
    np.testing.assert_allclose(of_two, expected, atol=0.006)
