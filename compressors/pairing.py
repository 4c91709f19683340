"""Does a fine-tune belong to a base: the same parameters, shapes and number format, before any number is computed."""

from __future__ import annotations

import torch

from compressors.errors import CheckpointError
from compressors.layout import HEAD, input_table, is_buffer, is_embedding
from compressors.tensors import Checkpoint

# (base, fine-tune): formats in which an unchanged weight is the same number in both
_WIDENINGS = {("BF16", "F32"), ("F16", "F32"), ("BF16", "F64"), ("F16", "F64"), ("F32", "F64")}


def matched_names(old: Checkpoint, new: Checkpoint) -> list[str]:
    """Names of all parameters of the fine-tune `new` of `old`, a head that either of them stores included.

    Raises CheckpointError naming a tensor that is missing, unknown, of another shape or of another number format.
    """
    ours = {name for name in old.names if not is_buffer(name)}
    theirs = {name for name in new.names if not is_buffer(name)}
    if missing := ours - theirs - {HEAD}:
        raise CheckpointError(
            f"the fine-tune {new.folder.name} lacks {min(missing)} (and {len(missing) - 1} more tensors of the base)"
        )
    if unknown := theirs - ours - {HEAD}:
        raise CheckpointError(
            f"the fine-tune {new.folder.name} has {min(unknown)}, which its base lacks ({len(unknown)} such tensors)"
        )
    for name in sorted(ours & theirs):
        _check_pair(old, new, name)
    return sorted(ours | theirs)


def tied_to(old: Checkpoint, new: Checkpoint, name: str) -> str | None:
    """The input table that `name` repeats in base and fine-tune, stored in the file or left out of it.

    Raises CheckpointError when only one of the two ties its head.
    """
    if name != HEAD:
        return None
    table = input_table(new.names)
    if table is None:
        if name in old.tensors and name in new.tensors:
            return None
        raise CheckpointError(
            f"{name} is stored in only one of base and fine-tune, and no input embedding is found for it"
        )
    if _repeats(old, table) and _repeats(new, table):
        return table
    if name in old.tensors and name in new.tensors:
        return None
    tying, other = ("base", "fine-tune") if name not in old.tensors or _repeats(old, table) else ("fine-tune", "base")
    raise CheckpointError(
        f"{name} differs from {table} in the {other}, but the {tying} ties the two; untie the {tying} first "
        f"(save its head as a tensor of its own)"
    )


def _repeats(checkpoint: Checkpoint, table: str) -> bool:
    """Whether a checkpoint's head is its input table."""
    return HEAD not in checkpoint.tensors or torch.equal(checkpoint.tensor(HEAD), checkpoint.tensor(table))


def _check_pair(old: Checkpoint, new: Checkpoint, name: str) -> None:
    before, after = old.tensors[name], new.tensors[name]
    if before.dtype != after.dtype and (before.dtype, after.dtype) not in _WIDENINGS:
        raise CheckpointError(
            f"{name} has dtype {after.dtype} in the fine-tune and {before.dtype} in the base: rounding would change every weight; "
            f"save the fine-tune in {before.dtype} or F32"
        )
    if before.shape[1:] != after.shape[1:] or (before.shape != after.shape and not is_embedding(name)):
        raise CheckpointError(
            f"{name} has shape {list(after.shape)} in the fine-tune and {list(before.shape)} in the base; is this its base?"
        )
    if before.shape and before.shape[0] > after.shape[0]:
        raise CheckpointError(
            f"{name} has fewer rows in the fine-tune than in the base; a smaller vocabulary is not supported"
        )
