"""The GPU kernels under Triton's interpreter against plain fp32 products. Shapes are tiny, because it is slow."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressors.execution import WIDE_ENTRY
from compressors.kernels.measure import BASE
from compressors.kernels.measure_gpu import LORA, SLOTS, Setting, equal_rank, table
from compressors.kernels.reference import add_deltas, dense_delta
from compressors.kernels.slots import SlotRows, SlotTable
from compressors.kernels.triton_slots import TritonSlots, launches
from tests.compressors.test_kernels import KINDS, Step, close, picking_factor, random_factor

CPU = torch.device("cpu")


def transposed(factor):
    """U picks outputs, as signs with a scale for each row are stored."""
    return replace(
        factor,
        out_features=factor.in_features,
        in_features=factor.out_features,
        v_start=factor.u_start,
        u_start=factor.v_start,
        v_entries=factor.u_entries,
        u_entries=factor.v_entries,
    )


def made(rng, how, out, size, offset, rank, density, kind):
    if how == "v picks":
        return picking_factor(rng, out, size, offset, density, kind)
    if how == "u picks":
        return transposed(picking_factor(rng, size, out, offset, density, kind))
    return random_factor(rng, out, size, offset, min(rank, out, size), density, kind)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    outs=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    size=st.sampled_from([1, 7, 40, 65, 130]),
    rank=st.integers(1, 70),
    density=st.floats(0.01, 1.0),
    group_rows=st.lists(st.sampled_from([1, 1, 2, 5, 16, 17, 65]), min_size=0, max_size=3),
    others=st.sampled_from([0, 3]),
    kind=st.sampled_from(KINDS),
    how=st.sampled_from(["pair", "pair", "v picks", "u picks"]),
    bf16=st.booleans(),
)
def test_adds_the_deltas_of_the_named_rows_and_touches_no_other(
    seed, outs, size, rank, density, group_rows, others, kind, how, bf16
):
    rng = np.random.default_rng(seed)

    def make(out, offset):
        return made(rng, how, out, size, offset, rank, density, kind)

    step = Step.drawn(rng, (outs, size), group_rows, others, bf16, make)
    close(step.applied(TritonSlots(CPU)), step.expected, bf16)


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_round_once(kind):
    """In fp16: the interpreter cuts bf16 off where a GPU rounds."""
    factor, product = random_factor(np.random.default_rng(0), 64, 48, 0, 12, 0.5, kind), TritonSlots(CPU)
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).half()
    y = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).half()
    y[1, 5] = torch.nan
    expected = (y.double() + x.double() @ dense_delta(factor).double().T).half()
    prepared = product.prepare([factor])
    assert prepared[0].kind == KINDS.index(kind)
    product.apply(y, x, product.group([(prepared, np.arange(5))]))
    assert y.isnan().sum() == 1
    assert (y == expected).float().mean() > 0.98


def test_a_row_is_the_same_alone_and_in_a_batch():
    rng, product = np.random.default_rng(2), TritonSlots(CPU)
    own = [product.prepare([random_factor(rng, 20, 150, 0, 18, 0.6, "int8")]) for _ in range(2)]
    x = torch.randn(9, 150, generator=torch.Generator().manual_seed(0))
    together, alone = torch.zeros(9, 20), torch.zeros(9, 20)
    rows = (np.array([0, 3, 5]), np.array([1, 2, 8]))
    product.apply(together, x, product.group(list(zip(own, rows, strict=True))))
    for prepared, theirs in zip(own, rows, strict=True):
        for row in theirs:
            product.apply(alone, x, product.group([(prepared, np.array([row]))]))
    assert torch.equal(alone, together)
    assert alone[rows[0]].abs().max() > 1


def test_a_replayed_launch_reads_what_the_buffers_hold_then():
    """The launches of one call, run again with the same arguments after loads, drops and other steps, as a CUDA graph would."""
    rng, product, dtype = np.random.default_rng(3), TritonSlots(CPU), torch.float32
    deltas = [
        [random_factor(rng, 20, 40, 0, rank, 0.5, kind), random_factor(rng, 30, 40, 20, rank, 0.5, kind)]
        for rank, kind in ((5, "int8"), (17, "bf16"), (3, "fp32"))
    ]
    prepared = [product.prepare(factors) for factors in deltas]
    held, step = SlotTable(2, 2, 80, CPU), SlotRows(40, 2, CPU)
    x, y = torch.zeros(40, 40, dtype=dtype), torch.zeros(40, 50, dtype=dtype)
    recorded = launches(y, x, held.fields, held.weights, held.counts, step.rows, step.few, step.many, held.max_rank)
    generator = torch.Generator().manual_seed(0)

    def replay(resident, groups):
        step.begin([(slot, np.array(rows)) for slot, rows in groups])
        x.copy_(torch.randn(x.shape, generator=generator))
        before = torch.randn(y.shape, generator=generator)
        y.copy_(before)
        for launch in recorded:
            launch.run()
        parts = [(deltas[resident[slot]], np.array(rows)) for slot, rows in groups if slot in resident]
        close(y, add_deltas(before, x, parts), False)
        if not parts:
            assert torch.equal(y, before)

    replay({}, [(0, [1, 2])])  # a slot without a delta
    held.write(0, prepared[0])
    held.write(1, prepared[1])
    replay({0: 0, 1: 1}, [(0, [3, 7]), (1, [4])])
    replay({0: 0, 1: 1}, [(1, list(range(0, 36, 2))), (0, [5])])  # many rows and few
    replay({0: 0, 1: 1}, [])
    held.write(0, prepared[2])  # another delta where the first one was
    replay({0: 2, 1: 1}, [(0, [0, 39]), (1, [20])])
    held.clear(1)
    replay({0: 2}, [(0, [9]), (1, [10])])


def test_a_combination_is_the_weighted_sum_of_its_parts():
    rng, product = np.random.default_rng(4), TritonSlots(CPU)
    factors = [random_factor(rng, 30, 20, 0, 6, 0.5, "bf16"), picking_factor(rng, 30, 20, 0, 0.3, "int8")]
    prepared = [product.prepare([factor]) for factor in factors]
    scaled = [product.scaled(product.scaled(prepared[0], 3.0), -0.5), product.scaled(prepared[1], 0.25)]
    x, y = torch.randn(20, 20, generator=torch.Generator().manual_seed(0)), torch.zeros(20, 30)
    product.apply(y, x, product.group([((*scaled[0], *scaled[1]), np.arange(20))]))
    delta = -1.5 * dense_delta(factors[0]) + 0.25 * dense_delta(factors[1])
    torch.testing.assert_close(y, x @ delta.T, rtol=1e-4, atol=1e-4)
    assert sum(product.nbytes(one) for one in scaled) == 0
    assert product.nbytes(prepared[0]) > 0


def test_rows_of_a_wider_matrix_and_wide_entries():
    rng, product = np.random.default_rng(5), TritonSlots(CPU)
    factor = random_factor(rng, 70, 12, 0, 4, 0.5, "fp32")
    assert factor.u_entries.dtype == WIDE_ENTRY
    wide, y = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 70)
    prepared = product.prepare([factor])
    for x in (wide[:, :12], wide[:, :12].T.contiguous().T):
        y.zero_()
        product.apply(y, x, product.group([(prepared, np.array([0, 2]))]))
        torch.testing.assert_close(y[[0, 2]], (x @ dense_delta(factor).T)[[0, 2]], rtol=1e-4, atol=1e-4)
        assert not y[1].any()


def test_the_op_has_a_schema_and_a_fake_implementation():
    rng, product = np.random.default_rng(6), TritonSlots(CPU)
    groups = product.group([(product.prepare([random_factor(rng, 8, 8, 0, 2, 1, "int8")]), np.arange(2))])
    held, step = groups.table, groups.rows
    arguments = (held.fields, held.weights, held.counts, step.rows, step.few, step.many, held.max_rank)
    op = torch.ops.deltaworks.add_slots.default
    torch.library.opcheck(
        op, (torch.zeros(3, 8), torch.ones(3, 8), *arguments), test_utils=("test_schema", "test_faketensor")
    )
    y = torch.zeros(3, 8)
    torch.compile(lambda x: op(y, x, *arguments), backend="aot_eager", fullgraph=True)(torch.ones(3, 8))
    assert y[:2].any()
    assert not y[2].any()


def test_the_bench_measures_all_three_products():
    calls = []

    def seconds(call):
        call()
        return 1e-6

    def dense_lora(y, x, a, b, slots):
        calls.append((a.shape, b.shape, len(slots)))
        return lambda: None

    cells = table(CPU, Setting((24, 16), 0.25, 2, 2), [0.5], [1, 20], dense_lora, seconds=seconds)
    assert [(cell.rows, cell.form) for cell in cells] == [(r, f) for r in (1, 20) for f in (BASE, LORA, SLOTS)]
    rank = calls[0][0][1]
    assert calls[0] == ((2, rank, 16), (2, 24, rank), 2)
    assert equal_rank(4000, (24, 16)) == 50
