"""Packed integers and written masks: every value comes back, every damage is named."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressors.errors import ArtifactError
from compressors.mask_codes import CODES, decode_mask, encode_mask, smallest_code
from compressors.packing import WIDTHS, largest, pack, packed_size, unpack

codes = st.sampled_from(WIDTHS).flatmap(
    lambda width: st.tuples(
        st.just(width), st.lists(st.integers(-largest(width) - 1, largest(width)), min_size=1, max_size=70)
    )
)


@settings(deadline=None)
@given(codes)
def test_packed_values_come_back(drawn):
    width, values = drawn
    packed = pack(np.array(values, dtype=np.int8), width)
    assert len(packed) == packed_size(len(values), width)
    assert unpack(packed, len(values), width).tolist() == values


def test_the_layout_of_packed_values():
    assert pack(np.array([1, -1, 7], dtype=np.int8), 4).tolist() == [0xF1, 0x07]
    assert pack(np.array([1, -1, 0], dtype=np.int8), 2).tolist() == [0b001101]
    assert pack(np.array([3, -1, 1], dtype=np.int8), 3).tolist() == [0b01111011, 0b0]


@pytest.mark.parametrize("width", [2, 3, 4])
def test_a_bit_behind_the_last_value_is_refused(width):
    packed = pack(np.array([1], dtype=np.int8), width)
    packed[-1] |= 0x80
    with pytest.raises(ArtifactError, match="padding"):
        unpack(packed, 1, width)
    with pytest.raises(ArtifactError, match="bytes"):
        unpack(packed, 9, width)


masks = st.integers(1, 700).flatmap(
    lambda rows: st.tuples(
        st.just(rows), st.lists(st.integers(1, rows), min_size=1, max_size=6), st.integers(0, 1 << 32)
    )
)


@settings(deadline=None)
@given(masks, st.sampled_from(CODES))
def test_masks_come_back(drawn, code):
    rows, keep, seed = drawn
    rng = np.random.default_rng(seed)
    kept = np.concatenate([np.sort(rng.permutation(rows)[:count]) for count in keep]).astype(np.int32)
    data = encode_mask(code, kept, np.array(keep), rows)
    assert decode_mask(code, data, np.array(keep), rows).tolist() == kept.tolist()
    sizes = {one: len(encode_mask(one, kept, np.array(keep), rows)) for one in CODES}
    assert sizes[smallest_code(kept, np.array(keep), rows)] == min(sizes.values())


def test_the_layout_of_masks():
    keep, rows = np.array([2, 3]), np.array([1, 2, 0, 1, 2], dtype=np.int32)
    assert encode_mask("bitmask", rows, keep, 3).tolist() == [0b110]  # the second column is whole: no byte
    assert encode_mask("gap8", rows, keep, 3).tolist() == [1, 0]
    assert encode_mask("gap8", np.array([5, 261, 771], dtype=np.int32), np.array([2, 1]), 1000).tolist() == [
        *(5, 255, 0),
        *(255, 255, 255, 6),
    ]


@pytest.mark.parametrize(
    ("code", "data", "word"),
    [
        ("bitmask", [0b11], "2 bits, but keeps 1"),
        ("bitmask", [0b10000001], "behind row 4"),
        ("bitmask", [1, 0], "needs 1 bytes, not 2"),
        ("gap8", [5], "row 5 of 5"),
        ("gap8", [0, 0], "gives 2 rows, but its columns keep 1"),
        ("gap8", [0, 255], "gap8"),
        ("gap8", [], "gives 0 rows"),
    ],
)
def test_a_damaged_mask_is_refused(code, data, word):
    with pytest.raises(ArtifactError, match=word):
        decode_mask(code, np.array(data, dtype=np.uint8), np.array([1]), 5)


def test_escapes_without_a_row_are_refused():
    with pytest.raises(ArtifactError, match="gives 0 rows, but its columns keep 0"):
        decode_mask("gap8", np.array([255], dtype=np.uint8), np.array([4, 4]), 4)
