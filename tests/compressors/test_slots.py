"""What the GPU kernels read, without them: factors as bitmasks, tables of slots, the rows of a step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressors.errors import SlotError
from compressors.kernels.gpu import triton_problem
from compressors.kernels.masked import (
    FIELDS,
    KIND,
    ON_INPUT,
    ON_OUTPUT,
    OUT_OFFSET,
    RANK,
    SCALE,
    U_VALUES,
    pack_piece,
    split_inputs,
)
from compressors.kernels.reference import dense_delta
from compressors.kernels.slots import FEW_ROWS, SlotNumbers, SlotRows, SlotTable, num_many
from tests.compressors.test_kernels import KINDS, picking_factor, random_factor

CPU = torch.device("cpu")
DTYPES = (torch.int8, torch.bfloat16, torch.float32)


def matrix(piece, first, outputs, inputs, splits):
    """A matrix of a piece, read as the kernels read it: output by output from its first value on."""
    values = piece.buffer[piece.at[first + 2] :]
    values = values[: len(values) // 4 * 4].view(DTYPES[piece.kind]).float().numpy()
    words = -(-inputs // 8)
    bits = np.unpackbits(
        piece.buffer[piece.at[first] :][: outputs * words].numpy().reshape(outputs, words), axis=1, bitorder="little"
    )[:, :inputs]
    count, width = splits
    starts = piece.buffer[piece.at[first + 1] :][: 4 * outputs * count].view(torch.int32).reshape(outputs, count)
    dense = np.zeros((outputs, inputs), dtype=np.float32)
    for output in range(outputs):
        for part in range(count):
            low, high = part * width, min((part + 1) * width, inputs)
            on = np.flatnonzero(bits[output, low:high])
            start = int(starts[output, part])
            dense[output, low + on] = values[start : start + len(on)]
    return torch.from_numpy(dense)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    out=st.integers(1, 30),
    size=st.integers(1, 200),
    density=st.floats(0.01, 1.0),
    kind=st.sampled_from(KINDS),
    picking=st.booleans(),
)
def test_a_packed_factor_holds_the_delta(seed, out, size, density, kind, picking):
    rng = np.random.default_rng(seed)
    make = picking_factor if picking else lambda *a: random_factor(*a[:4], min(9, out, size), *a[4:])
    factor = make(rng, out, size, 3, density, kind)
    piece = pack_piece(factor, CPU)
    if piece is None:
        assert not dense_delta(factor).any()
        return
    scale = piece.buffer[piece.at[0] :].view(torch.float32)
    if piece.rank:
        u = matrix(piece, 1, out, piece.rank, (1, piece.rank))
        v = matrix(piece, 4, piece.rank, size, split_inputs(size))
        delta = (u * scale[: piece.rank]) @ v
    else:
        delta = matrix(piece, 1, out, size, (1, size))
        delta *= scale[:size] if piece.role == ON_INPUT else scale[:out, None]
        assert piece.role in (ON_INPUT, ON_OUTPUT)
    torch.testing.assert_close(delta, dense_delta(factor), rtol=1e-5, atol=1e-4)
    assert len(piece.fields(0)) == FIELDS
    assert piece.fields(7)[: SCALE + 1][OUT_OFFSET] == 3
    assert piece.fields(0)[KIND] <= KINDS.index(kind)  # no wider than it must be
    assert piece.fields(0)[U_VALUES] == piece.buffer.data_ptr() + piece.at[3]


def test_the_parts_of_the_inputs_cover_them():
    for inputs in (1, 63, 64, 65, 576, 1536, 4096, 14336):
        count, width = split_inputs(inputs)
        assert count <= 8
        assert (count - 1) * width < inputs <= count * width


def test_a_table_says_what_does_not_fit_and_keeps_its_addresses():
    rng = np.random.default_rng(1)
    piece = pack_piece(random_factor(rng, 10, 12, 0, 5, 1.0, "int8"), CPU)
    table = SlotTable(2, 1, 2 * piece.rank - 1, CPU)
    addresses = [tensor.data_ptr() for tensor in (table.fields, table.weights, table.counts)]
    table.write(1, [piece])
    assert table.fields[1, 0, RANK] == piece.rank
    assert table.counts.tolist() == [0, 1]
    with pytest.raises(SlotError, match=f"sum to {2 * piece.rank}, over the {table.max_rank}"):
        table.write(0, [piece, piece])
    single = pack_piece(picking_factor(rng, 10, 12, 0, 0.5, "int8"), CPU)
    with pytest.raises(SlotError, match="5 pieces on one linear, over the 4"):
        table.write(0, [single] * 5)
    table.clear(1)
    assert table.counts.tolist() == [0, 0]
    assert [tensor.data_ptr() for tensor in (table.fields, table.weights, table.counts)] == addresses


def test_rows_of_a_step_are_written_in_place():
    step = SlotRows(200, 4, CPU)
    addresses = [tensor.data_ptr() for tensor in (step.rows, step.few, step.many)]
    step.begin([(2, np.arange(0, 130)), (0, np.array([131, 140])), (3, np.arange(150, 150 + FEW_ROWS + 1))])
    assert step.few.tolist() == [[0, 0, 2], *[[-1, 0, 0]] * 3]
    assert step.many[:4].tolist() == [[2, 2, 64], [2, 66, 64], [2, 130, 2], [3, 132, 17]]
    assert (step.many[4:, 0] == -1).all()
    assert step.rows[:3].tolist() == [131, 140, 0]
    assert step.rows[132:149].tolist() == list(range(150, 167))
    step.begin([])
    assert (step.few[:, 0] == -1).all()
    assert (step.many[:, 0] == -1).all()
    assert [tensor.data_ptr() for tensor in (step.rows, step.few, step.many)] == addresses


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_there_is_a_tile_for_all_rows(counts):
    step = SlotRows(sum(counts), len(counts), CPU)
    ends = np.cumsum(counts)
    step.begin([(i, np.arange(end - count, end)) for i, (end, count) in enumerate(zip(ends, counts, strict=True))])
    tiles = [tile for tile in (*step.few.tolist(), *step.many.tolist()) if tile[0] >= 0]
    assert sorted(row for _, first, count in tiles for row in range(first, first + count)) == list(range(sum(counts)))
    assert num_many(sum(counts), len(counts)) == len(step.many)


def test_slots_are_taken_and_given_back():
    numbers = SlotNumbers(2)
    assert [numbers.take(adapter) for adapter in (7, 9, 7)] == [0, 1, 0]
    with pytest.raises(SlotError, match="all 2 slots"):
        numbers.take(11)
    numbers.release(9)
    numbers.release(5)  # a dummy never had one
    assert numbers.take(11) == 1
    assert numbers.find(9) is None


def test_what_keeps_triton_from_running_is_said(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "needs a GPU, not 'cpu'" in triton_problem(CPU)
    monkeypatch.setattr("compressors.kernels.gpu.find_spec", lambda name: None)
    assert "not installed" in triton_problem(torch.device("cuda"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "not installed" in triton_problem(CPU)
