"""The C++ kernel and the torch form against a plain dense product."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressors.execution import WIDE_ENTRY, SparseFactor
from compressors.kernels.native import NativeKernel, NativeSparse
from compressors.kernels.torch_csr import TorchCsr
from compressors.masks import column_keys, factor_rows, layer_seed


@pytest.fixture(scope="session")
def kernel() -> NativeKernel:
    return NativeKernel.load()


def columns(rng, rows, keep, packed):
    start = np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)
    index = np.concatenate([np.sort(rng.choice(rows, k, replace=False)) for k in keep])
    values = rng.standard_normal(len(index)).astype(np.float32)
    dense = np.zeros((rows, len(keep)), dtype=np.float32)
    if packed:
        words = (values.view(np.uint32) & np.uint32(0xFFFF0000)) | index.astype(np.uint32)
        values = (words & np.uint32(0xFFFF0000)).view(np.float32)
        entries = words
    else:
        entries = np.empty(len(index), dtype=WIDE_ENTRY)
        entries["value"], entries["row"] = values, index
    dense[index, np.repeat(np.arange(len(keep)), keep)] = values
    return start, entries, dense


def random_factor(rng, out, size, offset, rank, density, packed):
    keep_u = rng.integers(1, max(2, int(out * density) + 1), rank)
    keep_v = rng.integers(1, max(2, int(size * density) + 1), rank)
    u_start, u_entries, u = columns(rng, out, keep_u, packed)
    v_start, v_entries, v = columns(rng, size, keep_v, packed)
    coef = rng.standard_normal(rank).astype(np.float32)
    factor = SparseFactor(out, size, offset, coef, v_start, u_start, v_entries, u_entries)
    return factor, torch.from_numpy((u * coef) @ v.T)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    outs=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    size=st.integers(1, 90),
    rank=st.integers(1, 40),
    density=st.floats(0.01, 1.0),
    group_rows=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    packed=st.booleans(),
    threads=st.sampled_from([1, 2]),
    form=st.sampled_from(["native", "torch"]),
)
def test_adds_the_deltas_of_the_named_rows_and_touches_no_other(
    kernel, seed, outs, size, rank, density, group_rows, packed, threads, form
):
    rng = np.random.default_rng(seed)
    product = NativeSparse(kernel, threads) if form == "native" else TorchCsr(torch.device("cpu"))
    total = sum(group_rows) + 3  # three rows stay with the base
    order = rng.permutation(total)
    x = torch.from_numpy(rng.standard_normal((total, size)).astype(np.float32))
    y = torch.from_numpy(rng.standard_normal((total, sum(outs))).astype(np.float32))
    expected, before = y.double(), y.clone()
    parts, first = [], 0
    for count in group_rows:
        rows = np.sort(order[first : first + count]).astype(np.int64)
        first += count
        factors = []
        for i, out in enumerate(outs):
            factor, delta = random_factor(rng, out, size, sum(outs[:i]), rank, density, packed)
            factors.append(factor)
            expected[rows, sum(outs[:i]) : sum(outs[: i + 1])] += x[rows].double() @ delta.double().T
        parts.append((product.prepare(factors), rows))
    product.apply(y, x, product.group(parts))
    scale = expected.abs().max().item() + 1
    assert (y.double() - expected).abs().max().item() < 1e-5 * scale
    untouched = order[first:]
    assert torch.equal(y[untouched], before[untouched])


def test_bf16_rounds_once(kernel):
    rng = np.random.default_rng(0)
    factor, delta = random_factor(rng, 64, 48, 0, 12, 0.5, packed=True)
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    product = NativeSparse(kernel, 1)
    expected = (y.double() + x.double() @ delta.double().T).bfloat16()
    product.apply(y, x, product.group([(product.prepare([factor]), np.arange(5))]))
    assert (y.double() - expected.double()).abs().max() <= 2**-7 * expected.double().abs().max()
    assert (y == expected).float().mean() > 0.98


@pytest.mark.parametrize("form", ["native", "torch"])
def test_a_scaled_delta_counts_its_weight_and_shares_the_entries(kernel, form):
    rng = np.random.default_rng(2)
    factor, delta = random_factor(rng, 40, 30, 0, 6, 0.5, packed=True)
    product = NativeSparse(kernel, 1) if form == "native" else TorchCsr(torch.device("cpu"))
    prepared = product.prepare([factor])
    scaled = product.scaled(product.scaled(prepared, 3.0), -0.5)
    x, y = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)), torch.zeros(5, 40)
    product.apply(y, x, product.group([(scaled, np.arange(5))]))
    torch.testing.assert_close(y, -1.5 * (x @ delta.T), rtol=1e-4, atol=1e-4)
    product.apply(y, x, product.group([(prepared, np.arange(5))]))
    torch.testing.assert_close(y, -0.5 * (x @ delta.T), rtol=1e-4, atol=1e-4)
    assert product.nbytes(scaled) < 0.2 * product.nbytes(prepared)


def test_reads_rows_of_a_wider_matrix(kernel):
    rng = np.random.default_rng(1)
    factor, delta = random_factor(rng, 20, 30, 0, 5, 0.5, packed=True)
    wide = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    x, y = wide[:, :30], torch.zeros(4, 20)
    product = NativeSparse(kernel, 1)
    product.apply(y, x, product.group([(product.prepare([factor]), np.array([1, 3]))]))
    torch.testing.assert_close(y[[1, 3]], (x @ delta.T)[[1, 3]], rtol=1e-4, atol=1e-4)
    assert not y[[0, 2]].any()


def test_native_masks_equal_the_reference(kernel):
    seed = layer_seed(3, "model.layers.0.mlp.up_proj.weight")
    keep = np.array([1, 5, 40, 99, 100], dtype=np.int32)
    for side in (0, 1):
        native = kernel.kept_rows(column_keys(seed, side, len(keep)), keep, 100)
        assert np.array_equal(native, factor_rows(seed, side, 100, keep))
