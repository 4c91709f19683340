"""ImPart as one would first write it down: what `deltaworks bench compress-loop` measures ours against.

Both checkpoints in memory, one matrix after the other, torch's SVD, the boundary shift that takes the mean anew for every column, a
random permutation for each column of each factor, and the dense product.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from compressors.impart import sparsity_of
from compressors.layout import is_projection


def main(base: str, fine_tune: str, out: str, ratio: str, beta: str, c: str) -> int:
    """`out` becomes the model folder of base + compressed delta."""
    torch.manual_seed(0)
    old, new = (load_file(Path(folder) / "model.safetensors") for folder in (base, fine_tune))
    merged = {}
    for name, weight in new.items():
        if not is_projection(name, weight.dim()):
            merged[name] = weight.float()
            continue
        u, s, vt = torch.linalg.svd(weight.float() - old[name].float(), full_matrices=False)
        sparsity, pruned = sparsity_of((len(u), vt.shape[1]), float(ratio), float(beta), "exact")
        drops = _drops(s.tolist(), sparsity, pruned, float(c))
        for k, drop in enumerate(drops):
            for column in (u[:, k], vt[k]):
                column[torch.randperm(len(column))[: int(len(column) * drop)]] = 0
                column /= 1 - drop
        rank = len(drops)
        merged[name] = old[name].float() + (u[:, :rank] * s[:rank]) @ vt[:rank]
    Path(out).mkdir(exist_ok=True)
    for file in Path(fine_tune).glob("*.json"):
        shutil.copy(file, out)
    save_file(merged, Path(out) / "model.safetensors")
    return 0


def _drops(sigma: Sequence[float], sparsity: float, pruned: float, c: float) -> list[float]:
    """The paper's allocator (algorithm 2), the boundary shifted a column at a time."""
    count = max(1, int(len(sigma) * (1 - pruned)))
    gamma = (sparsity - pruned) / (1 - pruned)
    drops = [(1 - value**c / sigma[0] ** c) * gamma for value in sigma[:count]]
    last = count
    while sum(drops) / count < gamma and last > 1:
        last -= 1
        drops[last] = 1.0
    return drops[:last]


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
