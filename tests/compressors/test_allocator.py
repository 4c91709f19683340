"""The drop ratios: the authors' allocator case by case, and what must hold for every spectrum."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compressors.errors import BudgetError
from compressors.impart import budget_columns, drop_ratios

REFERENCE = json.loads((Path(__file__).parent / "data" / "impart_allocator.json").read_text())
RULES = {"attn": "attention", "mlp": "mlp", "exact": "exact"}
SHAPE = (256, 384)


def settings_of(case: str) -> tuple[float, str, float, float]:
    ratio, rule, beta, c = case.split("_")
    return float(ratio[2:]), RULES[rule], float(beta[4:]), float(c[1:])


@pytest.mark.parametrize("case", REFERENCE["cases"])
def test_equals_the_authors_allocator(case):
    ratio, rule, beta, c = settings_of(case)
    expected = REFERENCE["cases"][case]["p"]
    drops = drop_ratios(REFERENCE["S"], SHAPE, ratio, beta, c, rule)
    assert len(drops) == 256
    assert sum(drop < 1 for drop in drops) == REFERENCE["cases"][case]["rank_kept"]
    assert drops[: len(expected)] == pytest.approx(expected, abs=1e-9)
    assert all(drop == 1 for drop in drops[len(expected) :])


def loop_reference(sigma, sparsity, pruned, c, slack):
    """The boundary shift as a plain loop; `slack` is what the mean may miss."""
    kept = max(1, int(len(sigma) * (1 - pruned)))
    gamma = (sparsity - pruned) / (1 - pruned)
    drops = [(1 - (s / sigma[0]) ** c) * gamma for s in sigma[:kept]]
    last = kept
    while sum(drops[:last]) + (kept - last) < gamma * kept - slack and last > 1:
        last -= 1
    return drops[:last] + [1.0] * (len(sigma) - last)


@settings(deadline=None)
@given(
    sigma=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=60),
    ratio=st.floats(1.5, 64),
    beta=st.sampled_from([0.0, 0.3, 0.6, 0.8]),
    c=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]),
    out=st.integers(2, 200),
)
def test_meets_the_budget_for_every_spectrum_and_shape(sigma, ratio, beta, c, out):
    sigma = sorted(sigma, reverse=True)
    shape = (out, len(sigma)) if out >= len(sigma) else (len(sigma), len(sigma))
    drops = drop_ratios(sigma, shape, ratio, beta, c, "exact")
    budget = shape[0] * shape[1] / ratio / (shape[0] + shape[1])  # in columns
    kept = [1 - drop for drop in drops if drop < 1]
    assert len(drops) == len(sigma)
    assert all(0 <= drop <= 1 for drop in drops)
    assert drops == sorted(drops)  # smaller singular values are dropped more
    assert sum(kept) <= max(budget, 1) + 1e-6
    if len(kept) > 1:
        survivors = len(sigma) * min(1.0, (1 - beta) * 2 * max(shape) / sum(shape))  # of the pre-pruning, before int()
        assert sum(kept) > budget * min(1.0, int(survivors) / survivors) - 1 - 1e-6


@settings(deadline=None)
@given(
    sigma=st.lists(st.floats(0.01, 10), min_size=3, max_size=40),
    ratio=st.floats(4, 64),
    c=st.sampled_from([0.5, 1.0]),
)
def test_closed_form_equals_the_loop(sigma, ratio, c):
    sigma = sorted(sigma, reverse=True)
    drops = drop_ratios(sigma, (len(sigma), 50), ratio, 0.6, c, "attention")
    sparsity = (1 + 1 - 1 / ratio) / 2
    expected = loop_reference(sigma, sparsity, 0.6, c, slack=1e-12)
    assume(expected == loop_reference(sigma, sparsity, 0.6, c, slack=-1e-12))  # else rounding decides about a column
    assert drops == pytest.approx(expected, abs=1e-9)


def test_edges():
    equal = drop_ratios([2.0] * 10, (10, 10), 4, 0.0, 1.0, "attention")
    assert equal == [0.0] + [1.0] * 9  # all alike: truncation to the budget of 10 / 8 columns
    assert drop_ratios([3.0, 2.0, 1.0, 0.5], (4, 4), 2, 0.8, 1.0, "attention") == [0.0, 1.0, 1.0, 1.0]  # a <= b
    assert drop_ratios([5.0], (1, 9), 64, 0.6, 1.0, "exact") == [0.0]  # at least one column
    assert drop_ratios([0.0, 0.0], (2, 2), 2, 0.0, 1.0, "exact")[0] == 0.0  # no division by zero
    truncated = drop_ratios(list(range(100, 0, -1)), (100, 100), 10, 0.0, 0.0, "attention")
    assert truncated == [0.0] * 5 + [1.0] * 95  # C = 0 is plain truncation
    same = [
        drop_ratios(s, (4, 8), 4, 0.3, 1.0, "exact")
        for s in ([4.0, 3, 2, 1], np.array([4.0, 3, 2, 1]), torch.tensor([4.0, 3, 2, 1], dtype=torch.bfloat16))
    ]
    assert same[0] == same[1] == same[2]


def test_a_list_of_floats_keeps_its_precision():
    drops = drop_ratios([1.0, 1 / 3, 1 / 7, 1 / 9], (4, 4), 1.0, 0.0, 1.0, "attention")
    assert drops[1] == pytest.approx((1 - 1 / 3) * 0.5, abs=1e-15)


def test_truncated_spectra_count_against_the_matrix_they_come_from():
    """Singular values that are not given are zero: they cost nothing, and the others share their budget."""
    drops = drop_ratios([5.0, 4.0, 3.0, 2.0], (32, 32), 8.0, 0.0, 1.0, "exact")
    assert len(drops) == 32
    assert drops[0] == 0
    assert drops[4:] == [1.0] * 28
    assert 1 < sum(1 - drop for drop in drops) <= 32 / 16  # (1 - a) N
    assert budget_columns((32, 32), 8.0, "exact") == 2
    assert drop_ratios([5.0], (32, 32), 8.0, 0.0, 1.0, "exact") == [0.0] + [1.0] * 31


def test_a_whole_number_of_columns_survives_rounding():
    assert budget_columns((60, 60), 3.0, "exact") == 10  # 60 * (1 - 5/6) is 9.999999999999998
    assert drop_ratios([1.0] * 60, (60, 60), 3.0, 0.9, 1.0, "exact").count(0.0) == 10


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"ratio": 0.5}, "ratio"),
        ({"beta": 1.0}, "beta"),
        ({"c": -1.0}, "c must"),
        ({"rule": "other"}, "rule"),
        ({"singular_values": []}, "singular_values"),
        ({"singular_values": [1.0] * 5}, "5 entries"),
        ({"singular_values": [1.0, float("nan")]}, "finite"),
        ({"singular_values": [1.0, -1.0]}, "negative"),
        ({"singular_values": [1.0, 2.0]}, "descend"),
    ],
)
def test_settings_that_cannot_be(change, word):
    arguments = {
        "singular_values": [1.0],
        "shape": (4, 4),
        "ratio": 4.0,
        "beta": 0.6,
        "c": 1.0,
        "rule": "exact",
    } | change
    with pytest.raises(BudgetError, match=word):
        drop_ratios(**arguments)
