"""The size told from the header is no less than what the kernels then hold, and a loaded delta holds nothing of its file."""

from pathlib import Path

import numpy as np
import pytest
import torch

from compressors.artifact import Artifact
from compressors.baselines import BitDeltaConfig, DareConfig, LowRankConfig
from compressors.compress import compress
from compressors.errors import ArtifactError
from compressors.execution import Shard, changed_rows, outside_projections, raw_delta, sparse_factor
from compressors.footprint import execution_nbytes
from compressors.impart import ImPartConfig
from compressors.kernels.masked import pack_piece
from compressors.kernels.native import NativeKernel, NativeSparse
from compressors.kernels.torch_csr import TorchCsr
from tests.compressors.conftest import base_tensors, tuned_tensors

SETTINGS = [
    *(ImPartConfig(ratio=4.0, value_dtype=dtype) for dtype in ("int8", "bf16", "fp16")),
    ImPartConfig(bytes_ratio=8.0, value_dtype="int4"),
    LowRankConfig(bytes_ratio=4.0, value_dtype="fp16"),
    LowRankConfig(bytes_ratio=8.0, value_dtype="int4"),
    DareConfig(bytes_ratio=4.0, value_dtype="bf16"),
    BitDeltaConfig(),
    BitDeltaConfig(per_row=True),
]


def loaded(form, artifact, name, record):
    return form.prepare([sparse_factor(artifact, name, Shard((0, record.shape[0]), (0, record.shape[1])))])


class Masked:
    """Loads as the GPU kernel does."""

    def prepare(self, factors):
        return [pack_piece(factor, torch.device("cpu")) for factor in factors]

    def nbytes(self, prepared):
        return sum(piece.buffer.nbytes for piece in prepared)


def held(form, artifact: Artifact) -> int:
    """Bytes of what the worker keeps: factors in the kernel's form, and the changes outside the projections."""
    total = 0
    for name, record in artifact.records.items():
        if record.kind == "rows":
            total += sum(part.nbytes for part in changed_rows(artifact, name) if part is not None)
        elif outside_projections(record):
            total += raw_delta(artifact, name).nbytes
        elif record.kind != "zero":
            total += form.nbytes(loaded(form, artifact, name, record))
    return total


@pytest.mark.parametrize("config", SETTINGS, ids=lambda c: f"{c.method}-{getattr(c, 'value_dtype', '')}")
def test_every_method_is_measured(checkpoint, tmp_path: Path, config):
    path = tmp_path / "delta.safetensors"
    compress(checkpoint("base", base_tensors()), checkpoint("tuned", tuned_tensors()), path, config)
    with Artifact.open(path) as artifact:
        kernel = NativeKernel.load()
        for level in range(kernel.level + 1):
            true = held(NativeSparse(kernel, 1, level), artifact)
            assert (
                true <= execution_nbytes(path) < 4 * true
            )  # small matrices are mostly what is kept beside the entries
        assert execution_nbytes(path, "csr") == held(TorchCsr(torch.device("cpu")), artifact)
        true = held(Masked(), artifact)
        assert true <= execution_nbytes(path, "masked") < 1.5 * true


def test_a_whole_fine_tune_is_measured_to_the_bytes_of_its_outside(checkpoint, tmp_path: Path):
    tuned = tuned_tensors()
    tuned["model.embed_tokens.weight"][[3, 7]] += 1
    tuned["model.norm.weight"] = tuned["model.norm.weight"] + 0.5
    path, form = tmp_path / "delta.safetensors", NativeSparse(NativeKernel.load(), 1)
    compress(checkpoint("base", base_tensors()), checkpoint("tuned", tuned), path, ImPartConfig(ratio=4.0))
    with Artifact.open(path) as artifact:
        table = sum(part.nbytes for part in changed_rows(artifact, "model.embed_tokens.weight") if part is not None)
        assert held(form, artifact) + table <= execution_nbytes(path)  # the head repeats the table
        assert execution_nbytes(path, "csr") == held(TorchCsr(torch.device("cpu")), artifact) + table


def test_what_is_loaded_does_not_view_the_file(checkpoint, tmp_path: Path):
    path, form = tmp_path / "delta.safetensors", NativeSparse(NativeKernel.load(), 1)
    compress(checkpoint("base", base_tensors()), checkpoint("tuned", tuned_tensors()), path, ImPartConfig(ratio=4.0))
    with Artifact.open(path) as artifact:
        kept = [loaded(form, artifact, name, r) for name, r in artifact.records.items() if r.kind == "impart"]
    assert kept
    assert np.isfinite(kept[0].factors[0].coef).all()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_file_that_is_no_delta_is_refused(tmp_path: Path):
    path = tmp_path / "delta.safetensors"
    path.write_bytes(b"\x10" + b"\0" * 30)
    with pytest.raises(ArtifactError):
        execution_nbytes(path)
