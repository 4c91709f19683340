"""Seeded masks: the format's test vectors, and the rule against its definition."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from compressors.masks import GOLDEN, column_key, column_keys, factor_rows, kept_rows, layer_seed, mix

SEED = 0x0123456789ABCDEF


def test_vectors():
    assert mix(1) == 0x5692161D100B05E5
    assert mix(GOLDEN) == 0xE220A8397B1DCDAF
    assert column_key(SEED, 0, 0) == 0x157A3807A48FAA9D
    assert column_key(SEED, 0, 1) == 0xD573529B34A1D093
    assert column_key(SEED, 3, 0) == 0xB8FC5B1060708C05
    assert kept_rows(SEED, 0, 0, 16, 5).tolist() == [0, 1, 3, 9, 11]
    assert kept_rows(SEED, 0, 1, 16, 5).tolist() == [6, 7, 12, 13, 14]
    assert kept_rows(SEED, 3, 0, 16, 5).tolist() == [2, 5, 10, 13, 14]
    assert kept_rows(SEED, 0, 0, 100, 7).tolist() == [0, 25, 27, 32, 67, 74, 82]
    assert layer_seed(0, "model.layers.0.self_attn.q_proj.weight") == 0x69C7CE6E1339C45B


@settings(deadline=None)
@given(seed=st.integers(0, 2**64 - 1), f=st.integers(0, 1), rows=st.integers(1, 60), data=st.data())
def test_follows_the_definition(seed, f, rows, data):
    keep = data.draw(st.lists(st.integers(1, rows), min_size=1, max_size=6))
    expected = []
    for k, count in enumerate(keep):
        key = column_key(seed, k, f)
        ranked = sorted((mix((key + (j + 1) * GOLDEN) % 2**64), j) for j in range(rows))
        expected += sorted(j for _, j in ranked[:count])
    assert factor_rows(seed, f, rows, np.array(keep, dtype=np.int32)).tolist() == expected
    assert column_keys(seed, f, len(keep)).tolist() == [column_key(seed, k, f) for k in range(len(keep))]


def test_columns_and_factors_are_independent():
    keep = np.full(200, 50, dtype=np.int32)
    u = factor_rows(SEED, 0, 100, keep).reshape(200, 50)
    v = factor_rows(SEED, 1, 100, keep).reshape(200, 50)
    overlap = np.mean([len(np.intersect1d(a, b)) for a, b in zip(u, v, strict=True)])
    assert abs(overlap - 25) < 1
    counts = np.bincount(u.reshape(-1), minlength=100)
    assert abs(counts - 100).max() < 40  # every row is kept about equally often
