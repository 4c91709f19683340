"""Every method's file: as large as asked, read back as what it means, and served as what it reads back."""

import math

import numpy as np
import pytest
import torch

from compressors import compress_cli
from compressors.artifact import Artifact
from compressors.baselines import BitDeltaConfig, DareConfig, LowRankConfig, encode_dare
from compressors.compress import compress
from compressors.decompress import delta_tensor
from compressors.errors import BudgetError
from compressors.execution import Shard, sparse_factor
from compressors.factors import read_factors
from compressors.impart import ImPartConfig
from compressors.kernels.native import NativeKernel, NativeSparse
from compressors.methods import METHODS
from compressors.quantize import ImPartQtConfig
from compressors.ratios import recount
from compressors.spectrum import decompose
from compressors.values import VALUE_DTYPES, round_columns
from compressors.verify import KNOWN_METHODS, verify
from tests.compressors.conftest import LAYER, base_tensors, drawn

WIDE = f"{LAYER}.mlp.up_proj.weight"
SHAPES = {f"{LAYER}.self_attn.q_proj.weight": (256, 256), WIDE: (640, 256), f"{LAYER}.mlp.down_proj.weight": (256, 640)}

SETTINGS = [
    *(ImPartConfig(bytes_ratio=8.0, value_dtype=dtype) for dtype in VALUE_DTYPES),
    ImPartQtConfig(bytes_ratio=8.0),
    *(LowRankConfig(bytes_ratio=8.0, value_dtype=dtype) for dtype in ("fp16", "int4")),
    *(DareConfig(bytes_ratio=8.0, value_dtype=dtype) for dtype in VALUE_DTYPES),
    BitDeltaConfig(),
    BitDeltaConfig(per_row=True),
]


@pytest.fixture
def pair(checkpoint):
    before = base_tensors() | {name: drawn(shape, 1, 1.0) for name, shape in SHAPES.items()}
    after = before | {name: before[name] + drawn(shape, 2) for name, shape in SHAPES.items()}
    return checkpoint("base", before), checkpoint("tuned", after), {name: after[name] - before[name] for name in SHAPES}


@pytest.fixture(params=SETTINGS, ids=lambda c: "-".join([c.method, *map(str, vars(c).values())]))
def made(request, pair, tmp_path):
    path = tmp_path / "delta.safetensors"
    compress(pair[0], pair[1], path, request.param)
    verify(path)
    with Artifact.open(path) as artifact:
        yield request.param, artifact, pair[2]


def test_the_bytes_are_what_was_asked(made):
    config, artifact, _ = made
    found = recount(artifact).bytes_ratio
    if isinstance(config, BitDeltaConfig):
        assert found > (14 if config.per_row else 15.9)
    else:
        assert found == pytest.approx(8.0, rel=0.02)
        assert artifact.manifest.bytes_ratio == 8.0
        assert artifact.manifest.ratio is None


def test_what_is_read_back_stands_for_the_delta(made):
    """Correlation with the dense delta: what each method keeps of a spiked matrix at 8 times less bytes."""
    config, artifact, deltas = made
    for name, delta in deltas.items():
        found = delta_tensor(artifact, name)
        alike = torch.nn.functional.cosine_similarity(found.flatten(), delta.flatten(), 0)
        assert alike > (0.6 if config.method == "lowrank" else 0.3), name
        slope = (found * delta).sum() / (delta * delta).sum()  # 1: the delta is not shrunk
        assert 0.35 < slope < 1.15, name


@pytest.mark.parametrize("rows", [1, 9])
def test_what_is_served_is_what_is_read_back(made, rows):
    _, artifact, _ = made
    form = NativeSparse(NativeKernel.load(), 1)
    for name, (out, width) in SHAPES.items():
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
        y = torch.zeros(rows, out)
        prepared = form.prepare([sparse_factor(artifact, name, Shard((0, out), (0, width)))])
        form.apply(y, x, form.group([(prepared, np.arange(rows))]))
        expected = x.double() @ delta_tensor(artifact, name).double().T
        torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-4)


def test_more_bytes_at_narrower_values_keep_more(pair, tmp_path):
    kept = []
    for dtype in ("fp16", "int8", "int4"):
        compress(pair[0], pair[1], tmp_path / dtype, ImPartConfig(bytes_ratio=16.0, value_dtype=dtype))
        with Artifact.open(tmp_path / dtype) as artifact:
            kept.append(recount(artifact).kept_values)
    assert kept[1] > 1.8 * kept[0]
    assert kept[2] > 1.8 * kept[1]


def test_dare_is_unbiased():
    delta = drawn((64, 48), 3)
    total = torch.zeros_like(delta, dtype=torch.float64)
    for seed in range(150):
        encoded = encode_dare(WIDE, delta, DareConfig(ratio=4.0, value_dtype="fp16", seed=seed))
        assert encoded.arrays["count"][0] == delta.numel() / 4
        total += dense_of(encoded, seed)
    error = (total / 150 - delta).norm() / delta.norm()
    assert error < 1.3 * math.sqrt(3 / 150)  # one draw has sqrt(ratio - 1) of the delta's norm


def dense_of(encoded, seed):
    """U of the record, by hand: kept rows of each column from the seed, values times the scale."""
    from compressors.masks import kept_rows, layer_seed

    out = torch.zeros(encoded.shape, dtype=torch.float64)
    place, count, columns = 0, int(encoded.arrays["count"][0]), encoded.shape[1]
    for k in range(columns):
        keep = count * (k + 1) // columns - count * k // columns
        rows = kept_rows(layer_seed(seed, encoded.name), k, 0, encoded.shape[0], keep)
        values = encoded.arrays["vals"][place : place + keep].astype(np.float64)
        out[rows.astype(np.int64), k] = torch.from_numpy(values * encoded.arrays["scale"][0])
        place += keep
    return out


@pytest.mark.parametrize("per_row", [False, True])
def test_bitdelta_is_the_sign_times_the_mean_magnitude(pair, tmp_path, per_row):
    compress(pair[0], pair[1], tmp_path / "d", BitDeltaConfig(per_row=per_row))
    with Artifact.open(tmp_path / "d") as artifact:
        found = delta_tensor(artifact, WIDE)
    delta = pair[2][WIDE]
    scale = delta.abs().mean(1, keepdim=True) if per_row else delta.abs().mean()
    torch.testing.assert_close(found, torch.where(delta > 0, 1.0, -1.0) * scale, rtol=1e-4, atol=1e-7)


def test_lowrank_is_the_best_approximation_of_its_rank(pair, tmp_path):
    compress(pair[0], pair[1], tmp_path / "d", LowRankConfig(ratio=8.0, value_dtype="fp16"))
    with Artifact.open(tmp_path / "d") as artifact:
        found, factors = delta_tensor(artifact, WIDE), read_factors(artifact, WIDE)
    rank = len(factors.coef)
    leading = decompose(pair[2][WIDE]).leading(rank)
    assert rank == 640 * 256 // 8 // (640 + 256)
    best = (leading.u * leading.s) @ leading.vt
    torch.testing.assert_close(found, best, rtol=2e-3, atol=2e-4)


def test_clipping_loses_less_than_the_whole_range():
    values = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    keep = np.array([1000, 3000], dtype=np.int32)
    for width, most in (
        (4, 0.13),
        (3, 0.22),
        (2, 0.45),
    ):  # Lloyd-Max for a normal: 0.10, 0.19, 0.34 and 0.44 for three levels
        codes, step = round_columns(values, keep, width)
        lost = np.linalg.norm(codes * np.repeat(step, keep) - values) / np.linalg.norm(values)
        whole = np.abs(values).max() / ((1 << (width - 1)) - 1)
        plain = np.linalg.norm(np.rint(values / whole) * whole - values) / np.linalg.norm(values)
        assert lost < plain
        assert lost < most


@pytest.mark.parametrize(
    ("method", "given", "word"),
    [
        (
            "bitdelta",
            {"ratio": 8.0},
            "--ratio does not belong to the method bitdelta; it belongs to impart, impart-qt, lowrank, dare",
        ),
        ("dare", {"beta": 0.5}, "--beta does not belong"),
        ("impart", {"per_row": True}, "belongs to bitdelta"),
        ("impart", {"bytes_ratio": 0.5}, "bytes_ratio must be a number >= 1"),
        ("impart", {"bytes_ratio": 8.0, "rule": "released"}, "exact"),
        ("lowrank", {"value_dtype": "int2"}, "unknown value dtype"),
        ("dare", {"seed": -1}, "seed"),
        ("dare", {"ratio": float("nan")}, "ratio"),
    ],
)
def test_bad_settings_are_named(method, given, word):
    with pytest.raises(BudgetError, match=word):
        compress_cli.configured(method, given)


def test_the_command_knows_every_method():
    assert tuple(METHODS) == compress_cli._METHODS
    assert set(METHODS) <= set(KNOWN_METHODS)
