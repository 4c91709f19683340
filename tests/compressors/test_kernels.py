"""The C++ kernel, at every instruction level and in every form, and the torch form against plain fp32 products."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressors.execution import WIDE_ENTRY, SparseFactor
from compressors.kernels import build
from compressors.kernels.choice import ALWAYS, Choice, choose
from compressors.kernels.forms import BF16, FP32, INT8
from compressors.kernels.measure import FORMS
from compressors.kernels.native import LEVELS, NativeKernel, NativeSparse
from compressors.kernels.reference import add_deltas, dense_delta, dense_factors
from compressors.kernels.torch_csr import TorchCsr
from compressors.masks import column_keys, factor_rows, layer_seed

KINDS = ("int8", "bf16", "fp32")
CHOSEN = "chosen"


@pytest.fixture(scope="session")
def kernel():
    return NativeKernel.load()


@pytest.fixture(scope="session")
def products(kernel, tmp_path_factory):
    """By level: the product with so many threads and this choice. A CPU without AVX-512 runs that level with its instructions
    written out in C++ (emulated_avx512.h), in a library where it stands in the place of the portable one.
    """
    made = {level: functools.partial(_product, kernel, level) for level in range(kernel.level + 1)}
    if kernel.level == 1:
        library = tmp_path_factory.mktemp("kernel") / "emulated.so"
        header = str(Path(__file__).with_name("emulated_avx512.h"))
        level = ("-O1", "-DDW_AVX512", "-Davx512_level=portable_level", *build.AVX2[1:], "-include", header)
        compilations = {"level": ("level.cpp", *level)}
        compilations |= {name: (f"{name}.cpp", "-O1") for name in ("sparse_factors", "packing")}
        build.compile_to(library, compilations)
        made[2] = functools.partial(_product, NativeKernel.load(library), 0)
    return made


def _product(kernel, level, threads, choice):
    return NativeSparse(kernel, threads, level, choice)


def entries_of(rng, rows, keep, kind):
    index = np.concatenate([np.sort(rng.choice(rows, k, replace=False)) for k in keep] or [[]]).astype(np.uint32)
    if kind == "int8":
        values = rng.integers(-128, 128, len(index)).astype(np.float32)
    else:
        values = rng.standard_normal(len(index)).astype(np.float32)
    if kind == "fp32":
        entries = np.empty(len(index), dtype=WIDE_ENTRY)
        entries["value"], entries["row"] = values, index
        return entries
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)) | index


def random_factor(rng, out, size, offset, rank, density, kind):
    """Columns of any density up to the given one, the leading quarter of them whole."""
    sides = []
    for rows in (size, out):
        keep = rng.integers(0, max(2, int(rows * density) + 1), rank)
        keep[: rank // 4] = rows
        sides.append((np.concatenate([[0], np.cumsum(keep)]).astype(np.int64), entries_of(rng, rows, keep, kind)))
    (v_start, v_entries), (u_start, u_entries) = sides
    coef = (rng.standard_normal(rank) / (100 if kind == "int8" else 1)).astype(np.float32)
    return SparseFactor(out, size, offset, coef, v_start, u_start, v_entries, u_entries)


def picking_factor(rng, out, size, offset, density, kind):
    """As DARE stores a delta: V picks inputs, some of them."""
    inputs = np.flatnonzero(rng.random(size) < 0.9)
    inputs = inputs if len(inputs) else np.arange(1)
    factor = random_factor(rng, out, size, offset, len(inputs), density, kind)
    ones = np.full(len(inputs), 1, dtype=np.float32)
    if factor.packed:
        entries = ones.view(np.uint32) | inputs.astype(np.uint32)
    else:
        entries = np.empty(len(inputs), dtype=WIDE_ENTRY)
        entries["value"], entries["row"] = ones, inputs
    return replace(factor, v_start=np.arange(len(inputs) + 1, dtype=np.int64), v_entries=entries)


def close(found, expected, bf16, between=0.0):
    """`between`: the largest sum of the terms' sizes, where they are rounded to bf16 before they are added."""
    if not expected.numel():
        return
    scale = expected.abs().max().item() + 1 + between
    assert (found.double() - expected.double()).abs().max().item() < (2**-7 if bf16 else 2e-5) * scale


def loudness(x, parts):
    """The largest over all outputs of sum_k |coef_k (x . v_k) u_k|."""
    found = [0.0]
    for factors, rows in parts:
        for factor in factors:
            u, v = dense_factors(factor)
            found.append(float(((x[rows].float() @ v).abs() @ u.abs().T).max()))
    return max(found)


@dataclass
class Step:
    """x, y, and the deltas of some of the rows: (factors of the linear's parts, rows) of each."""

    x: torch.Tensor
    y: torch.Tensor
    parts: list[tuple[list[SparseFactor], np.ndarray]]
    others: np.ndarray  # rows that stay with the base

    @classmethod
    def drawn(cls, rng, shape, group_rows, others, bf16, make):
        """`shape`: outs of the parts, and the size of x; `make(out, offset)` gives a factor."""
        (outs, size), dtype = shape, torch.bfloat16 if bf16 else torch.float32
        total = sum(group_rows) + others  # the others stay with the base; none of them: all rows have a delta
        order = rng.permutation(total)
        x = torch.from_numpy(rng.standard_normal((total, size)).astype(np.float32)).to(dtype)
        y = torch.from_numpy(rng.standard_normal((total, sum(outs))).astype(np.float32)).to(dtype)
        parts, first = [], 0
        for count in group_rows:
            rows = np.sort(order[first : first + count]).astype(np.int64)
            first += count
            parts.append(([make(out, sum(outs[:i])) for i, out in enumerate(outs)], rows))
        return cls(x, y, parts, order[first:])

    @property
    def expected(self):
        return add_deltas(self.y, self.x, self.parts)

    def applied(self, product):
        """What the product makes of y; that it leaves the other rows alone is asserted."""
        y = self.y.clone()
        groups = product.group([(product.prepare(factors), rows) for factors, rows in self.parts])
        if groups is not None:
            product.apply(y, self.x, groups)
        assert torch.equal(y[self.others], self.y[self.others])
        return y


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    outs=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    size=st.integers(1, 90),
    rank=st.integers(1, 70),
    density=st.floats(0.01, 1.0),
    group_rows=st.lists(st.sampled_from([1, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 512]), min_size=0, max_size=4),
    others=st.sampled_from([0, 3]),
    kind=st.sampled_from(KINDS),
    picking=st.booleans(),
    bf16=st.booleans(),
    threads=st.sampled_from([1, 2]),
    level=st.sampled_from(range(len(LEVELS))),
    form=st.sampled_from([CHOSEN, *FORMS, "torch"]),
)
def test_adds_the_deltas_of_the_named_rows_and_touches_no_other(
    products, seed, outs, size, rank, density, group_rows, others, kind, picking, bf16, threads, level, form
):
    rng = np.random.default_rng(seed)
    if form == "torch" or level not in products:
        product = TorchCsr(torch.device("cpu"))
    else:
        product = products[level](threads, choose(level) if form == CHOSEN else FORMS[form])
    make_factor = picking_factor if picking else random_factor

    def make(out, offset):
        own = (density,) if picking else (min(rank, out, size), density)
        return make_factor(rng, out, size, offset, *own, kind)

    step = Step.drawn(rng, (outs, size), group_rows, others, bf16, make)
    loud = loudness(step.x, step.parts) if form == "expanded bf16" else 0.0
    close(step.applied(product), step.expected, bf16, loud)


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_rounds_once(products, level, kind):
    if level not in products:
        pytest.skip("not on this CPU")
    rng = np.random.default_rng(0)
    factor = random_factor(rng, 64, 48, 0, 12, 0.5, kind)
    product = products[level](1, choose(level))
    assert product.prepare([factor]).factors[0].kind == {"int8": INT8, "bf16": BF16, "fp32": FP32}[kind]
    for rows in (3, 40):
        x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
        y = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
        y[1, 5] = torch.nan
        expected = (y.double() + x.double() @ dense_delta(factor).double().T).bfloat16()
        product.apply(y, x, product.group([(product.prepare([factor]), np.arange(rows))]))
        assert y.isnan().sum() == 1
        assert (y == expected).float().mean() > 0.98


@pytest.mark.parametrize("form", ["native", "torch"])
def test_a_scaled_delta_counts_its_weight_and_shares_the_entries(kernel, form):
    rng = np.random.default_rng(2)
    factor = random_factor(rng, 400, 300, 0, 6, 0.5, "bf16")
    delta = dense_delta(factor)
    product = NativeSparse(kernel, 1) if form == "native" else TorchCsr(torch.device("cpu"))
    prepared = product.prepare([factor])
    scaled = product.scaled(product.scaled(prepared, 3.0), -0.5)
    x, y = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)), torch.zeros(5, 400)
    product.apply(y, x, product.group([(scaled, np.arange(5))]))
    torch.testing.assert_close(y, -1.5 * (x @ delta.T), rtol=1e-3, atol=1e-3)
    product.apply(y, x, product.group([(prepared, np.arange(5))]))
    torch.testing.assert_close(y, -0.5 * (x @ delta.T), rtol=1e-3, atol=1e-3)
    assert product.nbytes(scaled) < 0.2 * product.nbytes(prepared)


def test_reads_rows_of_a_wider_matrix(kernel):
    rng = np.random.default_rng(1)
    factor = random_factor(rng, 20, 30, 0, 5, 0.5, "bf16")
    wide = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for x in (wide[:, :30], wide[:, :30].T.contiguous().T):
        y = torch.zeros(4, 20)
        product = NativeSparse(kernel, 1)
        product.apply(y, x, product.group([(product.prepare([factor]), np.array([1, 3]))]))
        torch.testing.assert_close(y[[1, 3]], (x @ dense_delta(factor).T)[[1, 3]], rtol=1e-4, atol=1e-4)
        assert not y[[0, 2]].any()


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
def test_a_row_is_the_same_alone_and_in_a_batch(products, level):
    if level not in products:
        pytest.skip("not on this CPU")
    rng = np.random.default_rng(2)
    large = random_factor(rng, 400, 500, 0, 350, 0.9, "int8")  # several parts of columns
    small = random_factor(rng, 400, 500, 0, 20, 0.4, "int8")
    x = torch.randn(9, 500, generator=torch.Generator().manual_seed(0))
    alone, together = torch.zeros(9, 400), torch.zeros(9, 400)
    one, two = products[level](1, choose(level)), products[level](2, choose(level))
    prepared = [one.prepare([factor]) for factor in (large, small)]
    assert prepared[0].factors[0].entries > 1 << 17
    rows = (np.array([0, 3, 5]), np.array([1, 2, 8]))
    two.apply(together, x, two.group(list(zip(prepared, rows, strict=True))))
    for own, theirs in zip(prepared, rows, strict=True):
        for row in theirs:
            one.apply(alone, x, one.group([(own, np.array([row]))]))
    assert torch.equal(alone, together)
    torch.testing.assert_close(together[rows[0]], x[rows[0]] @ dense_delta(large).T, rtol=1e-3, atol=1e-2)


def test_an_empty_plan_and_an_empty_delta_add_nothing(kernel):
    rng = np.random.default_rng(3)
    product = NativeSparse(kernel, 1)
    empty = replace(
        random_factor(rng, 8, 8, 0, 2, 1, "int8"), v_start=np.zeros(3, np.int64), v_entries=np.empty(0, np.uint32)
    )
    assert product.group([]) is None
    assert product.group([(product.prepare([empty]), np.arange(2))]) is None


def test_wide_sides_have_wide_indices(kernel):
    rng = np.random.default_rng(4)
    factor = random_factor(rng, 70_000, 12, 0, 3, 0.0001, "fp32")
    x = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    for rows in (2, 12):
        y = torch.zeros(12, 70_000)
        product = NativeSparse(kernel, 1)
        product.apply(y, x, product.group([(product.prepare([factor]), np.arange(rows))]))
        torch.testing.assert_close(y[:rows], (x @ dense_delta(factor).T)[:rows], rtol=1e-4, atol=1e-4)


def test_a_packed_delta_is_small(kernel):
    rng = np.random.default_rng(5)
    factor = random_factor(rng, 1536, 576, 0, 40, 0.5, "int8")
    product = NativeSparse(kernel, 1, 2, Choice(0.1, 0.7, ((0.0, ALWAYS),)))
    stored = len(factor.v_entries) + len(factor.u_entries)
    assert product.nbytes(product.prepare([factor])) < 1.8 * stored


def test_the_library_brings_no_second_openmp_runtime():
    assert b"libgomp" not in build.library().read_bytes()


def test_native_masks_equal_the_reference(kernel):
    seed = layer_seed(3, "model.layers.0.mlp.up_proj.weight")
    for rows, keep in ((100, [1, 5, 40, 99, 100]), (3, [1, 2, 3]), (1, [1]), (5000, [1, 17, 2500, 4999])):
        keep = np.array(keep, dtype=np.int32)
        for side in (0, 1):
            native = kernel.kept_rows(column_keys(seed, side, len(keep)), keep, rows)
            assert np.array_equal(native, factor_rows(seed, side, rows, keep))
