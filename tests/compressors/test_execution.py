"""Stored form -> execution form: the kernels add exactly what `delta_tensor` says, whole and in tensor-parallel shards."""

import numpy as np
import pytest
import torch

from compressors.artifact import Artifact
from compressors.compress import compress
from compressors.decompress import delta_tensor
from compressors.errors import ArtifactError
from compressors.execution import Shard, native_masks, outside_projections, sparse_factor
from compressors.impart import ImPartConfig
from compressors.kernels.native import NativeKernel, NativeSparse
from compressors.kernels.torch_csr import TorchCsr
from tests.compressors.conftest import LAYER, base_tensors, tuned_tensors

UP = f"{LAYER}.mlp.up_proj.weight"
WHOLE = Shard((0, 96), (0, 48))


@pytest.fixture(params=["int8", "bf16", "fp16", "lowrank"])
def artifact(request, checkpoint, tmp_path):
    tuned = tuned_tensors()
    config = ImPartConfig(ratio=4.0, value_dtype="int8" if request.param == "lowrank" else request.param)
    if request.param == "lowrank":
        tuned[UP] = base_tensors()[UP] + torch.outer(torch.arange(96.0), torch.arange(48.0)) / 1000
    compress(checkpoint("base", base_tensors()), checkpoint("tuned", tuned), tmp_path / "d.safetensors", config)
    with Artifact.open(tmp_path / "d.safetensors") as opened:
        yield opened


def forms():
    return [NativeSparse(NativeKernel.load(), 1), TorchCsr(torch.device("cpu"))]


def added(form, factor, x):
    y = torch.zeros(len(x), factor.out_offset + factor.out_features)
    form.apply(y, x, form.group([(form.prepare([factor]), np.arange(len(x)))]))
    return y[:, factor.out_offset :]


@pytest.mark.parametrize("form", forms(), ids=lambda form: form.name)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_adds_the_dense_delta(artifact, form, rows):
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(0))
    factor = sparse_factor(artifact, UP, WHOLE)
    expected = x.double() @ delta_tensor(artifact, UP).double().T
    torch.testing.assert_close(added(form, factor, x).double(), expected, rtol=1e-4, atol=1e-5)
    assert form.nbytes(form.prepare([factor])) >= factor.coef.nbytes


@pytest.mark.parametrize("form", forms(), ids=lambda form: form.name)
def test_tensor_parallel_shards_add_up(artifact, form):
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    whole = added(form, sparse_factor(artifact, UP, WHOLE), x)
    column = [
        added(form, sparse_factor(artifact, UP, Shard((a, a + 32), (0, 48), out_offset=7)), x) for a in (0, 32, 64)
    ]
    torch.testing.assert_close(torch.cat(column, 1), whole)
    row = [added(form, sparse_factor(artifact, UP, Shard((0, 96), (a, a + 24))), x[:, a : a + 24]) for a in (0, 24)]
    torch.testing.assert_close(row[0] + row[1], whole, rtol=1e-4, atol=1e-5)


def test_native_masks_give_the_same_factor(artifact):
    reference = sparse_factor(artifact, UP, WHOLE)
    native = sparse_factor(artifact, UP, WHOLE, native_masks(NativeKernel.load().kept_rows))
    assert np.array_equal(reference.u_entries, native.u_entries)
    assert np.array_equal(reference.v_entries, native.v_entries)


def test_what_lies_outside_the_projections_is_named(checkpoint, tmp_path):
    tuned = tuned_tensors()
    tuned["model.norm.weight"] = torch.full((48,), 2.0)
    compress(
        checkpoint("base", base_tensors()),
        checkpoint("tuned", tuned),
        tmp_path / "d.safetensors",
        ImPartConfig(ratio=4.0),
    )
    with Artifact.open(tmp_path / "d.safetensors") as opened:
        assert [n for n, r in opened.records.items() if outside_projections(r)] == ["model.norm.weight"]
        with pytest.raises(ArtifactError, match=r"model\.norm\.weight"):
            sparse_factor(opened, "model.norm.weight", Shard((0, 48), (0, 1)))
