"""ImPart-Qt: the authors' budget search case by case, what it pays for, and rounding by activations on a tiny Llama."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from compressors.artifact import Artifact
from compressors.calibrate import calibrated
from compressors.calibration import Calibration
from compressors.compress import compress
from compressors.decompress import delta_tensor
from compressors.errors import BudgetError, CheckpointError
from compressors.gptq import round_factors, round_in_order, round_rows
from compressors.impart import ImPartConfig, sparsify
from compressors.packing import largest
from compressors.quantize import (
    MIXED,
    ImPartQtConfig,
    column_groups,
    column_widths,
    encode_impart_qt,
    quantised_drop_ratios,
)
from compressors.record import Encoded, Unwritten
from compressors.spectrum import decompose
from compressors.tensors import Checkpoint
from compressors.verify import verify
from server.cli import main

DATA = Path(__file__).parent / "data"
SPECTRUM = json.loads((DATA / "impart_allocator.json").read_text())["S"]
REFERENCE = json.loads((DATA / "impart_quantised_budget.json").read_text())["cases"]
RULES = {"attn": "attention", "mlp": "mlp", "exact": "exact"}
SHAPE = (256, 384)


@pytest.mark.parametrize("case", REFERENCE)
def test_equals_the_authors_budget_search(case):
    ratio, rule, beta, c = case.split("_")
    drops = quantised_drop_ratios(SPECTRUM, SHAPE, float(ratio[4:]), float(beta[4:]), float(c[1:]), RULES[rule])
    expected = REFERENCE[case]["p"]
    assert len(drops) == 256
    assert drops[: len(expected)] == pytest.approx(expected, abs=1e-9)
    assert all(drop == 1 for drop in drops[len(expected) :])


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(40, 90),
    ratio=st.floats(4, 64),
    beta=st.sampled_from([0.0, 0.6, 0.8]),
    c=st.sampled_from([0.0, 0.5, 1.0]),
    out=st.integers(90, 300),
)
def test_the_bits_are_what_was_asked(seed, count, ratio, beta, c, out):
    """Exact accounting: within a column's bits of the budget."""
    sigma, shape = np.sort(np.random.default_rng(seed).lognormal(size=count))[::-1], (out, count)
    drops = np.array(quantised_drop_ratios(sigma, shape, ratio, beta, c, "exact", "exact"))
    bits = ((1 - drops) * column_widths(count)).sum() * sum(shape)
    budget = min(16 * shape[0] * shape[1] / ratio, sum(column_widths(count)) * sum(shape))
    column = 8 * sum(shape) * (1 + 1e-4 * count)
    assert bits <= budget + column
    assert beta > 0 or bits >= budget - column  # what is pruned beforehand is not filled up again


def test_what_the_middle_bits_are_charged():
    exact = np.array(quantised_drop_ratios(SPECTRUM, SHAPE, 32, 0.6, 0.5, "exact", "exact"))
    released = np.array(quantised_drop_ratios(SPECTRUM, SHAPE, 32, 0.6, 0.5, "exact"))
    assert (1 - exact).sum() > 1.1 * (1 - released).sum()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"ratio": 0.5}, "ratio must be"),
        ({"beta": 1.0}, "beta must be"),
        ({"rule": "mean"}, "unknown rule 'mean'"),
        ({"accounting": "kind"}, "unknown accounting 'kind'; one of exact, released"),
        ({"singular_values": [1.0, float("nan")]}, "finite"),
    ],
)
def test_bad_settings_are_named(settings, word):
    good = {"singular_values": [2.0, 1.0], "shape": (8, 8), "ratio": 8, "beta": 0.5, "c": 1, "rule": "exact"}
    with pytest.raises(BudgetError, match=word):
        quantised_drop_ratios(**good | settings)


def test_bytes_do_not_go_with_released_accounting():
    with pytest.raises(BudgetError, match="bytes_ratio needs"):
        ImPartQtConfig(bytes_ratio=8.0, accounting="released")


def test_groups_cover_the_columns():
    assert column_groups(1) == ((1, 8),)
    assert column_groups(34) == ((2, 8), (32, 3))
    assert column_groups(50) == ((2, 8), (32, 3), (16, 2))


# Rounding by activations


def inputs(features: int, rows: int = 1500) -> torch.Tensor:
    """Few directions and noise, as activations are."""
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(12, features, generator=generator)
    return torch.randn(rows, 12, generator=generator) @ mix + 0.3 * torch.randn(rows, features, generator=generator)


def test_rounding_keeps_the_mask_and_loses_less_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 200, generator=generator)
    mask = (torch.rand(24, 200, generator=generator) < 0.4).float()
    weight *= mask
    x = inputs(200)
    hessian, widths = x.T @ x, [8, 8] + [3] * 10 + [2] * 12
    codes, step = round_rows(weight, mask, hessian, widths)
    assert not codes[mask.numpy() == 0].any()
    assert (np.abs(codes).max(1) <= [largest(width) for width in widths]).all()
    nearest = np.clip(np.rint(weight.numpy() / step[:, None]), *_range(widths)) * step[:, None]
    assert _lost(codes * step[:, None], weight, x) < 0.6 * _lost(nearest, weight, x)


def test_in_order_each_column_has_its_step():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(300, 20, generator=generator)
    mask = torch.ones(300, 20)
    x = inputs(20)
    widths = [8, 8] + [3] * 18
    codes, step = round_in_order(weight, mask, x.T @ x, widths)
    nearest = np.clip(np.rint(weight.numpy() / step), *(bound.T for bound in _range(widths))) * step
    assert _lost(codes * step, weight, x) < 0.8 * _lost(nearest, weight, x)


def _range(widths):
    top = np.array([[largest(width)] for width in widths])
    return -top, top


def _lost(found, weight, x):
    return float(((x @ (torch.from_numpy(np.asarray(found, dtype=np.float32)) - weight).T) ** 2).sum())


def test_a_factor_pair_is_closer_on_the_inputs():
    generator = torch.Generator().manual_seed(2)
    delta = torch.randn(96, 10, generator=generator) @ torch.randn(10, 160, generator=generator)
    delta = 0.02 * (delta + torch.randn(96, 160, generator=generator))
    spectrum, config = decompose(delta), ImPartQtConfig(ratio=16.0)
    drops = config.drops(spectrum, "w", (96, 160))
    x = inputs(160)
    nearest = sparsify(spectrum, drops, "w", 0, MIXED)
    rounded = round_factors(spectrum, drops, "w", 0, "exact", x.T @ x)
    assert (rounded.keep_u == nearest.keep_u).all()
    assert rounded.bits == nearest.bits
    exact = dense(sparsify(spectrum, drops, "w", 0, _floats()))
    assert _lost(dense(rounded), exact, x) < 0.6 * _lost(dense(nearest), exact, x)


def test_unseen_inputs_do_not_break_it():
    """A Hessian of rank one with a feature that is always zero."""
    delta = 0.02 * torch.randn(40, 30, generator=torch.Generator().manual_seed(3))
    spectrum, x = decompose(delta), torch.zeros(1, 30)
    x[0, 1:] = 1
    drops = ImPartQtConfig(ratio=8.0).drops(spectrum, "w", (40, 30))
    for hessian in (x.T @ x, torch.zeros(30, 30)):
        found = dense(round_factors(spectrum, drops, "w", 0, "exact", hessian))
        assert torch.isfinite(found).all()
        assert found.any()


def _floats():
    from compressors.values import value_form

    return value_form("fp16")


def dense(factors):
    arrays = {key: getattr(factors, key) for key in ("coef", "keep_u", "keep_v", "u_vals", "v_vals")}
    shape = {160: (96, 160), 30: (40, 30)}
    tall = 160 if factors.keep_v.max() > 40 else 30
    encoded = Encoded("w", "impart", shape[tall], arrays, len(factors.coef), bits=factors.bits)
    return delta_tensor(Unwritten(0, encoded), "w")


# On a model


def logits(folder: Path, changed: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in changed:
                parameter += changed[name]
        return model(tokens).logits


def test_calibration_brings_the_served_model_closer(language_pair):
    root, base, tuned = language_pair
    calibration = Calibration(root / "text.txt", 8, 64)
    tokens = calibration.tokens(tuned)
    assert tokens.shape == (8, 64)
    wanted = logits(tuned, {}, tokens)
    config = ImPartQtConfig(ratio=8.0)
    errors = {}
    for rounding in ("nearest", "activations"):
        path = root / f"{rounding}.safetensors"
        compress(base, tuned, path, config, calibration=calibration if rounding == "activations" else None)
        verify(path)
        with Artifact.open(path) as artifact:
            assert artifact.manifest.method == "impart-qt"
            assert artifact.manifest.value_dtype == "mixed"
            changed = {name: delta_tensor(artifact, name) for name in artifact.records}
        errors[rounding] = float((logits(base, changed, tokens) - wanted).norm())
    assert errors["activations"] < 0.95 * errors["nearest"]


def test_stages_are_those_of_the_paper(language_pair):
    root, base, tuned = language_pair
    with Checkpoint(base) as old, Checkpoint(tuned) as new:
        names = [
            one.name for one in calibrated(old, new, ImPartQtConfig(), Calibration(root / "text.txt", 2, 32), False)
        ]
    first = [name.split(".")[-2] for name in names[:7]]
    assert [set(first[:3]), first[3], set(first[4:6]), first[6]] == [
        {"q_proj", "k_proj", "v_proj"},
        "o_proj",
        {"gate_proj", "up_proj"},
        "down_proj",
    ]
    assert len(names) == 14


def test_the_same_text_gives_the_same_bytes(language_pair):
    root, base, tuned = language_pair
    files = []
    for number in range(2):
        compress(base, tuned, root / f"{number}", ImPartQtConfig(), calibration=Calibration(root / "text.txt", 2, 32))
        files.append((root / f"{number}").read_bytes())
    assert files[0] == files[1]


def test_mistakes(language_pair, tmp_path, capsys):
    root, base, tuned = language_pair
    short = tmp_path / "short.txt"
    short.write_text("the fox")
    with pytest.raises(CheckpointError, match="has 2 tokens; a calibration needs one sequence of 64"):
        compress(base, tuned, tmp_path / "d", ImPartQtConfig(), calibration=Calibration(short, 2, 64))
    with pytest.raises(BudgetError, match="belongs to the method impart-qt and to --distil, not to impart"):
        compress(base, tuned, tmp_path / "d", ImPartConfig(), calibration=Calibration(short, 2, 64))
    assert not (tmp_path / "d").exists()
    arguments = ["delta", "compress", str(base), str(tuned), "-o", str(tmp_path / "d")]
    assert main([*arguments, "--calibration-tokens", "512", "--method", "impart-qt"]) == 1
    assert "name one with --calibration" in capsys.readouterr().err
    assert main([*arguments, "--calibration", str(root / "text.txt")]) == 1
    assert "--calibration belongs to --auto, --distil and the method impart-qt" in capsys.readouterr().err
    assert main([*arguments, "--method", "impart-qt", "--calibration", str(root / "text.txt"), "--ratio", "8"]) == 0
    assert "impart-qt" in capsys.readouterr().out


def test_a_matrix_of_low_rank_is_kept_whole():
    delta = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)) @ torch.ones(1, 64)
    encoded = encode_impart_qt("w", decompose(delta), delta, ImPartQtConfig(ratio=8.0))
    assert encoded.kind == "lowrank"
    torch.testing.assert_close(delta_tensor(Unwritten(0, encoded), "w"), delta)
