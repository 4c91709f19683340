"""Value widths and written masks: the same delta whatever its masks are stored as, at its bytes, served as it is read."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressors.artifact import Artifact
from compressors.baselines import DareConfig, LowRankConfig
from compressors.compress import compress
from compressors.decompress import delta_tensor
from compressors.errors import BudgetError
from compressors.execution import Shard, sparse_factor
from compressors.factors import read_factors
from compressors.footprint import execution_nbytes
from compressors.impart import ImPartConfig
from compressors.kernels.forms import positions_and_values
from compressors.kernels.native import NativeKernel, NativeSparse
from compressors.mask_codes import CODES, code_of, encode_mask, mask_bytes
from compressors.masks import factor_rows
from compressors.merge import MergeConfig, merge
from compressors.methods import encode_projection
from compressors.quantize import ImPartQtConfig
from compressors.ratios import recount
from compressors.record import Unwritten
from compressors.values import VALUE_DTYPES
from compressors.verify import verify
from server.cli import main
from tests.compressors.conftest import LAYER, base_tensors, drawn

SHAPES = {f"{LAYER}.self_attn.q_proj.weight": (160, 160), f"{LAYER}.mlp.up_proj.weight": (600, 160)}
METHODS = (
    (ImPartConfig, {"value_dtype": "int4"}),
    (ImPartConfig, {"value_dtype": "fp16"}),
    (ImPartQtConfig, {}),
    (DareConfig, {"value_dtype": "int8"}),
)


@pytest.fixture
def pair(checkpoint):
    before = base_tensors() | {name: drawn(shape, 1, 1.0) for name, shape in SHAPES.items()}
    after = before | {name: before[name] + drawn(shape, 2, 0.02) for name, shape in SHAPES.items()}
    return checkpoint("base", before), checkpoint("tuned", after)


@pytest.mark.parametrize(("config", "given"), METHODS, ids=lambda one: getattr(one, "method", None))
def test_a_written_mask_stands_for_the_same_delta(pair, tmp_path, config, given):
    found = {}
    for mask in ("auto", "seeded", *CODES):
        path = tmp_path / mask
        compress(*pair, path, config(ratio=8.0, mask=mask, seed=3, **given))
        verify(path)
        with Artifact.open(path) as artifact:
            assert artifact.manifest.mask == (mask if mask in CODES else "seeded")
            found[mask] = {name: delta_tensor(artifact, name) for name in SHAPES}, recount(artifact)
    assert (tmp_path / "auto").read_bytes() == (tmp_path / "seeded").read_bytes()
    for mask in CODES:
        assert all(torch.equal(found[mask][0][name], found["seeded"][0][name]) for name in SHAPES)
        assert found[mask][1].kept_values == found["seeded"][1].kept_values
        assert found[mask][1].projection_bytes > found["seeded"][1].projection_bytes


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("config", "given"), METHODS, ids=lambda one: getattr(one, "method", None))
def test_the_mask_is_paid_for(pair, tmp_path, config, given, code):
    compress(*pair, tmp_path / "d", config(bytes_ratio=12.0, mask=code, **given))
    with Artifact.open(tmp_path / "d") as artifact:
        for name, shape in SHAPES.items():
            stored = sum(artifact.array(f"{name}::{key}").nbytes for key in artifact.records[name].sha256)
            budget, column = 2 * shape[0] * shape[1] / 12, 2 * sum(shape) + 12
            assert budget - (0.01 * budget if config is DareConfig else column) < stored < 1.02 * budget
    assert execution_nbytes(tmp_path / "d") > 0


@given(rows=st.integers(1, 3000), share=st.floats(0.001, 1.0), columns=st.integers(1, 30), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_a_masks_bytes_are_known_before_it_is_drawn(rows, share, columns, seed):
    keep = np.full(columns, max(1, int(share * rows)), dtype=np.int32)
    drawn_rows = factor_rows(seed, 0, rows, keep)
    sizes = {code: len(encode_mask(code, drawn_rows, keep, rows)) for code in CODES}
    assert mask_bytes("bitmask", keep, rows).sum() == sizes["bitmask"]
    escapes = sizes["gap8"] - (keep.sum() if keep[0] < rows else 0)
    told = mask_bytes("gap8", keep, rows).sum() - (keep.sum() if keep[0] < rows else 0)
    assert abs(told - escapes) <= 2 + 4 * np.sqrt(columns * (1 + escapes))


CONFIGS = [
    *(ImPartConfig(ratio=4.0, value_dtype=v, mask=m) for v, m in itertools.product(VALUE_DTYPES, ("auto", *CODES))),
    *(DareConfig(ratio=4.0, value_dtype=v, mask=m) for v, m in itertools.product(VALUE_DTYPES, ("auto", *CODES))),
    *(LowRankConfig(ratio=4.0, value_dtype=v) for v in VALUE_DTYPES),
    *(ImPartQtConfig(ratio=8.0, mask=m) for m in ("auto", *CODES)),
]


@given(
    config=st.sampled_from(CONFIGS),
    shape=st.tuples(st.integers(24, 90), st.integers(24, 90)),
    rows=st.sampled_from([1, 3, 33]),
    size=st.sampled_from([1e-5, 0.02, 30.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_every_width_and_mask_is_served_as_it_is_read(config, shape, rows, size, seed):
    encoded = encode_projection("w.weight", drawn(shape, seed, size), [config])[0]
    source = Unwritten(getattr(config, "seed", 0), encoded, mask=code_of(getattr(config, "mask", "auto")))
    factor, factors = (
        sparse_factor(source, "w.weight", Shard((0, shape[0]), (0, shape[1]))),
        read_factors(source, "w.weight"),
    )
    for entries, columns in ((factor.u_entries, factors.u), (factor.v_entries, factors.v)):
        assert np.array_equal(positions_and_values(entries)[1], columns.values)  # no value loses a bit on its way
    form = NativeSparse(NativeKernel.load(), 1)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(seed))
    y = torch.zeros(rows, shape[0])
    form.apply(y, x, form.group([(form.prepare([factor]), np.arange(rows))]))
    expected = x.double() @ delta_tensor(source, "w.weight").double().T
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("mask", ["auto", *CODES])
def test_merged_masks_are_written_as_asked(pair, tmp_path, mask):
    for number, seed in enumerate((1, 2)):
        compress(*pair, tmp_path / f"{number}", ImPartConfig(ratio=8.0, mask="gap8" if number else "auto", seed=seed))
    paths = [tmp_path / "0", tmp_path / "1"]
    merge(paths, pair[0], tmp_path / "both", MergeConfig(weights=(0.5, 2.0), mask=mask))
    verify(tmp_path / "both")
    expected = dict.fromkeys(SHAPES, torch.zeros(()))
    for path, weight in zip(paths, (0.5, 2.0), strict=True):
        with Artifact.open(path) as artifact:
            expected = {name: expected[name] + weight * delta_tensor(artifact, name) for name in SHAPES}
    with Artifact.open(tmp_path / "both") as artifact:
        for name in SHAPES:
            assert artifact.records[name].mask in (CODES if mask == "auto" else (mask,))
            torch.testing.assert_close(delta_tensor(artifact, name), expected[name])


@pytest.mark.parametrize("mask", ["auto", *CODES])
def test_one_delta_alone_keeps_its_mask_unless_another_is_asked(pair, tmp_path, mask):
    compress(*pair, tmp_path / "one", DareConfig(ratio=8.0, mask="gap8"))
    merge([tmp_path / "one"], pair[0], tmp_path / "scaled", MergeConfig(weights=(2.0,), mask=mask))
    verify(tmp_path / "scaled")
    with Artifact.open(tmp_path / "one") as one, Artifact.open(tmp_path / "scaled") as scaled:
        for name in SHAPES:
            assert scaled.records[name].mask == ("bitmask" if mask == "bitmask" else "gap8")
            torch.testing.assert_close(delta_tensor(scaled, name), 2 * delta_tensor(one, name))


def test_pairs_that_cannot_be_are_named(pair, tmp_path, capsys):
    base, tuned = map(str, pair)
    out = ["-o", str(tmp_path / "d")]
    for wrong, word in (
        (["--method", "lowrank", "--mask", "gap8"], "--mask does not belong to the method lowrank"),
        (["--method", "bitdelta", "--mask", "seeded"], "it belongs to impart, impart-qt, dare"),
        (
            ["--method", "dare", "--mask", "bitmask", "--bytes-ratio", "16"],
            "--mask bitmask takes a bit for every entry",
        ),
        (["--auto", "--mask", "gap8"], "--auto chooses --mask itself"),
    ):
        assert main(["delta", "compress", base, tuned, *out, *wrong]) == 1
        assert word in capsys.readouterr().err
    assert main(["delta", "compress", base, tuned, *out, "--method", "dare", "--mask", "gap8"]) == 0
    assert "masks gap8" in capsys.readouterr().out
    again = ["delta", "merge", *out[1:], "-o", str(tmp_path / "m"), "--base", base]
    for wrong, word in (
        (["--mask", "seeded"], "--mask seeded: no seed draws"),
        (["--mask", "gap8", "--method", "ties"], "--mask gap8 belongs to --method ta"),
        (["--mask", "gap8", "--compress", "lowrank"], "--mask does not belong to the method lowrank"),
    ):
        assert main([*again, *wrong]) == 1
        assert word in capsys.readouterr().err
    assert main([*again, "--mask", "bitmask", "--compress", "dare", "--bytes-ratio", "12"]) == 0
    assert "masks bitmask" in capsys.readouterr().out
    with pytest.raises(BudgetError, match="unknown --mask 'rice'; one of auto, seeded, bitmask, gap8"):
        ImPartConfig(mask="rice")
