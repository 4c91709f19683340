"""Bounds, measures and models against values from elsewhere, and properties that hold whatever the data."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.errors import FitError
from steering.gate.bounds import (
    beta_cdf,
    beta_inv,
    bootstrap_mean,
    fewest_rows,
    mcnemar,
    upper_bound,
    wilson,
)
from steering.gate.cascade import calibrated, sigmoid
from steering.gate.measures import auroc, bins_of, brier, ece, effective
from steering.gate.models import centred, fit_isotonic, fit_logistic

Array = np.ndarray[tuple[int], np.dtype[np.float64]]


def test_upper_bounds_by_table() -> None:
    assert upper_bound(0, 100, 0.05) == pytest.approx(0.02951, abs=5e-6)
    assert upper_bound(5, 500, 0.1) == pytest.approx(0.01847, abs=5e-6)
    assert upper_bound(20, 1000, 0.05) == pytest.approx(0.02893, abs=5e-6)
    assert upper_bound(7, 7, 0.1) == upper_bound(0, 0, 0.1) == 1
    assert upper_bound(0, 50, 0.1) == pytest.approx(1 - 0.1 ** (1 / 50), abs=1e-12)
    for wrong in ((3, 2), (-1, 5)):
        with pytest.raises(ValueError, match="events of"):
            upper_bound(*wrong, 0.1)


@given(st.integers(0, 300), st.integers(1, 300), st.floats(0.001, 0.999))
@settings(max_examples=200, deadline=None)
def test_the_beta_function_is_the_binomial_tail(k: int, more: int, p: float) -> None:
    """P(X > k) for X binomial(n, p) is I_p(k + 1, n - k)."""
    n = k + more
    logs = [
        math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1) + j * math.log(p) + (n - j) * math.log1p(-p)
        for j in range(k + 1, n + 1)
    ]
    assert beta_cdf(p, k + 1, n - k) == pytest.approx(math.fsum(map(math.exp, logs)), abs=1e-10)


@given(st.floats(0.001, 0.999), st.floats(0.5, 500), st.floats(0.5, 500))
@settings(max_examples=100, deadline=None)
def test_the_inverse_inverts(p: float, a: float, b: float) -> None:
    assert beta_cdf(beta_inv(p, a, b), a, b) == pytest.approx(p, abs=1e-7)


def test_the_beta_function_at_its_ends() -> None:
    assert (beta_cdf(0, 2, 3), beta_cdf(1, 2, 3), beta_cdf(-1, 2, 3)) == (0, 1, 0)
    assert beta_cdf(0.3, 1, 1) == pytest.approx(0.3)
    assert beta_cdf(0.5, 4e4, 4e4) == pytest.approx(0.5, abs=1e-9)


def test_fewest_rows_just_reach_the_bound() -> None:
    for epsilon, delta in ((0.02, 0.1), (0.05, 0.05), (0.01, 0.2)):
        n = fewest_rows(epsilon, delta)
        assert upper_bound(0, n, delta) <= epsilon < upper_bound(0, n - 1, delta)
    assert fewest_rows(0.02, 0.1) == 114


def test_wilson_by_table() -> None:
    assert wilson(0.5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson(0.0, 10) == (pytest.approx(0, abs=1e-12), pytest.approx(0.2775, abs=1e-4))
    assert wilson(0.3, 0) == (0, 1)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(3, 10) == mcnemar(10, 3) == pytest.approx(2 * 378 / 8192)
    assert mcnemar(0, 5) == pytest.approx(0.0625)
    assert mcnemar(4, 4) == mcnemar(0, 0) == 1


def test_the_bootstrap_covers_the_mean() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 400)
    low, high = bootstrap_mean(values, np.ones(400))
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert bootstrap_mean(values, np.ones(400)) == (low, high)
    weighted = bootstrap_mean(np.array([0.0, 1.0] * 50), np.array([1.0, 3.0] * 50))
    assert weighted[0] < 0.75 < weighted[1]


def test_measures_by_hand() -> None:
    s, y, w = np.array([0.9, 0.8, 0.7, 0.1]), np.array([1.0, 0, 1, 0]), np.ones(4)
    assert auroc(s, y, w) == pytest.approx(3 / 4)
    assert auroc(np.ones(4), y, w) == pytest.approx(0.5)
    assert auroc(s, np.ones(4), w) is None
    assert auroc(s, y, np.array([1.0, 3, 1, 1])) == pytest.approx((4 + 1) / 8)
    assert brier(s, y, w) == pytest.approx((0.01 + 0.64 + 0.09 + 0.01) / 4)
    assert ece(s, y, w, "width") == pytest.approx((0.1 + 0.8 + 0.3 + 0.1) / 4)
    assert ece(s, y, w, "mass", 2) == pytest.approx((0.35 + 0.1) / 2)
    assert effective(np.array([1.0, 1, 2])) == pytest.approx(16 / 6)
    assert [one.weight for one in bins_of(np.zeros(7), np.ones(7), np.ones(7))] == [1]
    assert bins_of(np.ones(3), np.ones(3), np.ones(3), "width")[0].score == 1


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.integers(1, 4)), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_a_weight_is_as_good_as_that_many_rows(rows: list[tuple[float, bool, int]]) -> None:
    s, y, w = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    many = np.repeat(s, w.astype(int)), np.repeat(y, w.astype(int)), np.ones(int(w.sum()))
    assert brier(s, y, w) == pytest.approx(brier(*many))
    assert ece(s, y, w, "width") == pytest.approx(ece(*many, "width"))
    assert ece(s, y, w, "mass") == pytest.approx(ece(*many, "mass"))
    assert auroc(s, y, w) == pytest.approx(auroc(*many))


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.4, 0.7, 0.9]), st.booleans(), st.integers(1, 3)), min_size=1))
@settings(max_examples=200, deadline=None)
def test_isotonic_is_the_least_squares_monotone_fit(rows: list[tuple[float, bool, int]]) -> None:
    """Against the min-max formula: the fit at x is max over a <= x of min over b >= x of the mean on [a, b]."""
    p, y, w = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    found = fit_isotonic(p, y, w)
    for at in np.unique(p):
        means = [
            [np.average(y[(p >= a) & (p <= b)], weights=w[(p >= a) & (p <= b)]) for b in np.unique(p[p >= at])]
            for a in np.unique(p[p <= at])
        ]
        assert calibrated(found.x, found.y, float(at)) == pytest.approx(max(map(min, means)), abs=1e-9)
    assert all(b > a for a, b in pairwise(found.x))
    assert all(b >= a for a, b in pairwise(found.y))
    levels = [calibrated(found.x, found.y, at) for at in np.linspace(-0.1, 1.1, 60)]
    assert levels == sorted(levels)


def test_centred_steps_rise_and_keep_the_mean() -> None:
    """Three steps by hand, and a large sample: rising everywhere, as close to the truth as the steps."""
    p, y, w = np.array([0.2, 0.4, 0.5, 0.7, 0.9]), np.array([0, 1, 0, 1, 1.0]), np.ones(5)
    found = centred(fit_isotonic(p, y, w), p, w)
    assert found.x == pytest.approx((0, 0.2, 0.45, 0.8, 1))
    assert found.y == pytest.approx((0, 0.5 / 2, 1.5 / 3, 2.5 / 3, 1))
    random = np.random.default_rng(1)
    p = random.random(5000)
    y = (random.random(5000) < p**3).astype(float)
    many = np.ones(5000)
    found = centred(fit_isotonic(p, y, many), p, many)
    grid = np.linspace(0, 1, 400)
    levels = np.array([calibrated(found.x, found.y, at) for at in grid])
    assert (np.diff(levels) > 0).mean() > 0.95  # level only where two shrunken steps would fall
    assert np.abs(levels - grid**3).mean() < 0.02


def test_isotonic_mends_a_miscalibrated_score() -> None:
    random = np.random.default_rng(1)
    p = random.random(20_000)
    y = (random.random(20_000) < p**3).astype(float)
    found = fit_isotonic(p, y, np.ones(20_000))
    fresh = random.random(20_000)
    truth = (random.random(20_000) < fresh**3).astype(float)
    s = np.array([calibrated(found.x, found.y, at) for at in fresh])
    assert ece(s, truth, np.ones(20_000)) < 0.02
    assert ece(fresh, truth, np.ones(20_000)) > 0.2


def test_the_logistic_fit_is_where_the_gradient_vanishes() -> None:
    random = np.random.default_rng(2)
    x, w = random.normal(size=(300, 4)), random.uniform(0.5, 2, 300)
    y = (random.random(300) < 1 / (1 + np.exp(-(x @ [1.0, -2, 0, 0.5] + 0.3)))).astype(float)
    found = fit_logistic(x, y, w, l2=0.7)
    z = x @ np.array(found.weights) + found.bias
    residual = w * (1 / (1 + np.exp(-z)) - y)
    assert np.abs(x.T @ residual + 0.7 * np.array(found.weights)).max() < 1e-7
    assert abs(residual.sum()) < 1e-7
    assert fit_logistic(x, y, w, l2=0.7) == found
    assert np.abs(found.weights).max() > np.abs(fit_logistic(x, y, w, l2=70).weights).max()


@given(st.integers(0, 10_000), st.sampled_from([1e-3, 1.0, 1e3]), st.sampled_from([1e-2, 1.0, 30.0]))
@settings(max_examples=40, deadline=None)
def test_the_logistic_fit_converges(seed: int, l2: float, scale: float) -> None:
    """Separable, rare, collinear and badly scaled rows as well."""
    random = np.random.default_rng(seed)
    x = scale * random.normal(size=(40, 3))
    x = np.column_stack([x, x[:, 0]])
    y = (x[:, 0] > np.sort(x[:, 0])[-1 - seed % 30]).astype(float)
    y[np.argmax(x[:, 0])] = 1.0
    found = fit_logistic(x, y, np.ones(40), l2)
    p = np.array([sigmoid(float(z)) for z in x @ np.array(found.weights) + found.bias])
    assert np.abs(x.T @ (p - y) + l2 * np.array(found.weights)).max() < 1e-5 * max(scale, 1)
    assert abs((p - y).sum()) < 1e-5


def test_what_cannot_be_fitted() -> None:
    x, w = np.zeros((3, 1)), np.ones(3)
    for y in (np.zeros(3), np.ones(3)):
        with pytest.raises(FitError, match="one class"):
            fit_logistic(x, y, w)
    with pytest.raises(FitError, match="l2"):
        fit_logistic(x, np.array([0.0, 1, 0]), w, l2=0)


def test_the_sigmoid_does_not_overflow() -> None:
    assert (sigmoid(1000), sigmoid(-1000), sigmoid(math.inf), sigmoid(-math.inf)) == (1, 0, 1, 0)
