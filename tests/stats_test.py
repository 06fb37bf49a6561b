"""Intervals cover, tests keep their level, and both agree with SciPy and with exact values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from jaxmerge import stats

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
SIZES = {"a": 300, "b": 120, "c": 60}
CHANCES = {"a": 0.6, "b": 0.35, "c": 0.8}


def draw(rng: np.random.Generator, *, few_values: bool = True) -> dict[str, np.ndarray]:
    """Scores with the means of CHANCES: 0 and 1, or any between."""
    if few_values:
        return {t: (rng.random(n) < CHANCES[t]).astype(float) for t, n in SIZES.items()}
    return {t: rng.beta(2 * CHANCES[t], 2 * (1 - CHANCES[t]), n) for t, n in SIZES.items()}


def test_objective_is_the_weighted_mean_of_means() -> None:
    samples = {"a": np.array([0.0, 1.0]), "b": np.array([1.0]), "c": np.array([0.0, 0.0, 0.3])}
    assert stats.objective(samples, WEIGHTS) == pytest.approx(0.25 + 0.3 + 0.02)


@pytest.mark.parametrize("few_values", [True, False])
def test_interval_covers_the_truth(few_values: bool) -> None:
    rng = np.random.default_rng(1)
    truth = sum(WEIGHTS[task] * CHANCES[task] for task in WEIGHTS)
    simulations, hits, misses_below = 300, 0, 0
    for seed in range(simulations):
        samples = draw(rng, few_values=few_values)
        low, high = stats.interval(samples, WEIGHTS, resamples=1000, seed=seed)
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
    low, high = stats.interval({"a": x_N}, {"a": 1.0}, confidence=confidence)
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
    assert stats.interval(samples, WEIGHTS) == pytest.approx((0.6, 0.6))


def test_interval_does_not_depend_on_the_order_of_tasks() -> None:
    samples = draw(np.random.default_rng(4))
    turned = dict(reversed(samples.items()))
    assert stats.interval(samples, WEIGHTS) == stats.interval(turned, WEIGHTS)
    assert stats.interval(samples, WEIGHTS) != stats.interval(samples, WEIGHTS, seed=1)


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
            WEIGHTS,
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
    compared = stats.paired(a, b, WEIGHTS)
    assert compared.delta == pytest.approx(
        stats.objective(a, WEIGHTS) - stats.objective(b, WEIGHTS)
    )
    assert 0 < compared.low < compared.delta < compared.high
    assert compared.p == 1 / 10_001  # never 0
    turned = stats.paired(b, a, WEIGHTS)
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
    p = stats.paired(a, b, weights, resamples=20_000).p
    assert 0.1 < exact < 0.9
    # Five standard errors of a share among 20,000 draws.
    assert p == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 20_000))


def test_paired_p_is_that_of_scipy() -> None:
    rng = np.random.default_rng(7)
    a, b = draw(rng, few_values=False)["a"], draw(rng, few_values=False)["a"]
    p = stats.paired({"a": a}, {"a": b}, {"a": 1.0}).p
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
    assert stats.paired(samples, samples, WEIGHTS) == stats.Comparison(0.0, 0.0, 0.0, 1.0)


def test_wrong_samples_are_refused() -> None:
    samples = draw(np.random.default_rng(10))
    with pytest.raises(ValueError, match=r"\['a', 'b', 'c'\].*\['a'\]"):
        stats.objective(samples, {"a": 1.0})
    with pytest.raises(ValueError, match="task b"):
        stats.interval({**samples, "b": np.array([0.5, np.nan])}, WEIGHTS)
    with pytest.raises(ValueError, match="task c"):
        stats.interval({**samples, "c": np.array([])}, WEIGHTS)
    with pytest.raises(ValueError, match="300 and 299"):
        stats.paired(samples, {**samples, "a": samples["a"][1:]}, WEIGHTS)
