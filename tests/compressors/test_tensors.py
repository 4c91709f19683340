"""Tensors of a checkpoint folder: read one by one, checked, and refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compressors.errors import CheckpointError
from compressors.tensors import Checkpoint

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)


def test_tensors_of_every_dtype_and_shape_come_back(checkpoint: Callable[..., Path]) -> None:
    tensors = {f"of.{dtype}": torch.arange(-6, 6).reshape(3, 4).to(dtype) for dtype in DTYPES}
    tensors |= {"int8": torch.tensor([-1], dtype=torch.int8), "bytes": torch.tensor([255], dtype=torch.uint8)}
    tensors |= {"bool": torch.tensor([True, False]), "scalar": torch.tensor(2.5), "none": torch.empty(0, 7)}
    with Checkpoint(checkpoint("made", tensors)) as found:
        assert found.names == sorted(tensors)
        for name, tensor in tensors.items():
            read = found.tensor(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read, tensor)
            read.zero_()  # it is the caller's own
            assert torch.equal(found.tensor(name), tensor)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_value_that_is_no_number_is_named(checkpoint: Callable[..., Path], value: float, dtype: torch.dtype) -> None:
    weight = torch.ones(70, 50, dtype=dtype)
    weight[-1, -1] = value
    with Checkpoint(checkpoint("made", {"w": weight, "empty": torch.empty(0)})) as found:
        assert not found.finite("empty").numel()
        with pytest.raises(CheckpointError, match="made: w holds NaN or infinite"):
            found.finite("w")


def test_what_cannot_be_read_is_named(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("made", {"w": torch.ones(4, 4), "z": torch.zeros(1, dtype=torch.float8_e4m3fn)})
    with Checkpoint(folder) as found:
        with pytest.raises(CheckpointError, match="z has dtype F8_E4M3, known are F64"):
            found.tensor("z")
        with pytest.raises(CheckpointError, match="has no tensor y"):
            found.tensor("y")
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-40])
        with pytest.raises(CheckpointError, match=r"made: \w cannot be read: the file ends before it"):
            found.tensor("w")


def test_a_table_is_read_by_blocks_of_rows(checkpoint: Callable[..., Path]) -> None:
    weight = torch.randn(10, 3).bfloat16()
    broken = weight.clone()
    broken[7, 1] = float("nan")
    with Checkpoint(
        checkpoint("made", {"w": weight, "x": broken, "ids": torch.arange(3), "no": torch.empty(0, 3)})
    ) as found:
        table = found.table("w")
        assert table.shape == (10, 3)
        for rows in (slice(0, 4), slice(4, 10), slice(8, 99), slice(10, 12), slice(5, 2)):
            assert torch.equal(table[rows], weight[rows])
        assert found.table("no")[0:5].shape == (0, 3)
        assert torch.equal(found.table("x")[0:7], weight[:7])
        with pytest.raises(CheckpointError, match="x holds NaN"):
            found.table("x")[7:8]
        with pytest.raises(CheckpointError, match="ids has dtype I64, not a float"):
            found.table("ids")
