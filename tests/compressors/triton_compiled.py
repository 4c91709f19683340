"""Triton's compiler takes the kernels, for GPUs of two generations: what its interpreter accepts, a GPU need not."""

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from compressors.kernels.slots import SlotRows, SlotTable
from compressors.kernels.triton_slots import FEW_BLOCKS, MANY_BLOCKS, launches

POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
CPU = torch.device("cpu")


def recorded():
    table, step = SlotTable(2, 3, 300, CPU), SlotRows(64, 2, CPU)
    x, y = torch.zeros(64, 512, dtype=torch.bfloat16), torch.zeros(64, 768, dtype=torch.bfloat16)
    return launches(y, x, table.fields, table.weights, table.counts, step.rows, step.few, step.many, table.max_rank)


@pytest.mark.parametrize(("blocks", "arch"), [(FEW_BLOCKS, 80), (MANY_BLOCKS, 90)], ids=["few rows", "many rows"])
def test_compiles(blocks, arch):
    found = [launch for launch in recorded() if launch.constants["BLOCK_T"] == blocks["BLOCK_T"]]
    assert [launch.kernel.fn.__name__ for launch in found] == ["shrink", "expand"]
    for launch in found:
        constants = dict(launch.constants)
        options = {"num_warps": constants.pop("num_warps"), "enable_fp_fusion": True}
        names = launch.kernel.arg_names
        signature = {
            name: POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            for name, value in zip(names, launch.arguments, strict=False)
        }
        signature |= dict.fromkeys(constants, "constexpr")
        assert set(signature) == set(names)
        source = ASTSource(launch.kernel, signature, {(names.index(name),): value for name, value in constants.items()})
        made = compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        assert made.metadata.shared < 99 << 10  # what the smallest of these GPUs has for a block
        assert ("mma" in made.asm["ptx"]) == constants["FAST"]  # tensor cores
