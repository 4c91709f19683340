"""Calibration texts, the divergence that settings are judged by, and the search for the best of them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressors.artifact import Artifact
from compressors.baselines import BitDeltaConfig, LowRankConfig
from compressors.calibration import Calibration
from compressors.compress import compress, compress_each
from compressors.decompress import decompress
from compressors.divergence import Divergence
from compressors.errors import BudgetError, CheckpointError
from compressors.impart import ImPartConfig
from compressors.search import GRID, candidates, search
from compressors.verify import verify
from server.cli import main


@pytest.fixture
def calibration(language_pair):
    return Calibration(language_pair[0] / "text.txt", 6, 48)


@torch.no_grad()
def by_hand(fine_tune: Path, other: Path, tokens: torch.Tensor) -> float:
    told, found = (
        torch.log_softmax(AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)(tokens).logits, -1)
        for one in (fine_tune, other)
    )
    return float((told.exp() * (told - found)).sum(-1).mean())


def test_the_divergence_is_that_of_the_merged_model(language_pair, calibration, tmp_path):
    _, base, tuned = language_pair
    delta = tmp_path / "d.safetensors"
    compress(base, tuned, delta, ImPartConfig(ratio=8.0))
    decompress(delta, base, tmp_path / "merged", "fp32")
    expected = by_hand(tuned, tmp_path / "merged", calibration.tokens(tuned))
    divergence = Divergence(base, tuned, calibration)
    assert divergence.of(delta).kl == pytest.approx(expected, rel=1e-4)
    assert divergence.of(delta).kl == pytest.approx(expected, rel=1e-4)  # nothing is left of the first delta


def test_a_delta_without_loss_does_not_diverge(language_pair, calibration, tmp_path):
    _, base, tuned = language_pair
    compress(base, tuned, tmp_path / "d", LowRankConfig(ratio=1.0, value_dtype="fp16"))
    assert 0 <= Divergence(base, tuned, calibration).of(tmp_path / "d").kl < 1e-6


def test_the_loss_is_that_of_the_text(language_pair, calibration):
    _, base, tuned = language_pair
    divergence = Divergence(base, tuned, calibration)
    tokens = calibration.tokens(tuned)
    for folder in (base, tuned):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            assert divergence.of_model(folder).loss == pytest.approx(float(model(tokens, labels=tokens).loss), rel=1e-4)
    assert divergence.of_model(tuned).kl < 1e-6 < divergence.of_model(base).kl


def test_one_pass_writes_what_many_would(language_pair, tmp_path):
    _, base, tuned = language_pair
    configs = [ImPartConfig(bytes_ratio=8.0), BitDeltaConfig(), LowRankConfig(bytes_ratio=8.0, value_dtype="int4")]
    compress_each(base, tuned, [(config, tmp_path / f"each{i}") for i, config in enumerate(configs)])
    for i, config in enumerate(configs):
        compress(base, tuned, tmp_path / f"alone{i}", config)
        assert (tmp_path / f"alone{i}").read_bytes() == (tmp_path / f"each{i}").read_bytes()


def test_the_best_candidate_is_kept(language_pair, calibration, tmp_path):
    _, base, tuned = language_pair
    out = tmp_path / "best.safetensors"
    tried = [*candidates(4.0, 0, "int8", "impart")[:2], *candidates(4.0, 0, "int8", "lowrank"), BitDeltaConfig()]
    seen = []
    trials = search(base, tuned, out, tried, 4.0, calibration, report=seen.append)
    verify(out)
    assert sorted(seen, key=lambda one: (not one.fits, one.kl)) == trials
    assert [one.kl for one in trials if one.fits] == sorted(one.kl for one in trials if one.fits)
    with Artifact.open(out) as artifact:
        assert artifact.manifest.method == trials[0].config.method
    assert Divergence(base, tuned, calibration).of(out).kl == pytest.approx(trials[0].kl, rel=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]


def test_what_is_too_large_is_not_chosen(language_pair, calibration, tmp_path):
    """BitDelta takes a 16th whatever is asked for, and would win against a 64th."""
    _, base, tuned = language_pair
    tried = [BitDeltaConfig(), LowRankConfig(bytes_ratio=24.0, value_dtype="int4")]
    trials = search(base, tuned, tmp_path / "d", tried, 24.0, calibration)
    assert [(one.config.method, one.fits) for one in trials] == [("lowrank", True), ("bitdelta", False)]
    with pytest.raises(BudgetError, match="no candidate fits bytes_ratio 24"):
        search(base, tuned, tmp_path / "none", [BitDeltaConfig()], 24.0, calibration)
    assert not (tmp_path / "none").exists()


def test_the_grid_holds_every_method_and_plain_truncation():
    found = candidates(16.0, 3, "fp16")
    assert {one.method for one in found} == {"impart", "impart-qt", "lowrank", "dare", "bitdelta"}
    assert all(one.rows_dtype == "fp16" for one in found)
    assert {0.0, 0.6, 0.8} == {beta for beta, _ in GRID}
    assert max(c for _, c in GRID) == 2.0
    assert {getattr(one, "value_dtype", None) for one in candidates(2.0, 0, "int8", "dare")} == {"int4", "int8", "fp16"}
    assert {getattr(one, "value_dtype", None) for one in candidates(2.1, 0, "int8", "dare")} == {"int4", "int8"}


def test_chats_are_rendered_by_the_models_template(language_pair, tmp_path):
    _, _, tuned = language_pair
    rows = [
        {"text": "the quick fox"},
        {"prompt": "the dog", "completion": "runs far"},
        {"messages": [{"role": "user", "content": "jumps"}]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tuned / "chat_template.jinja").write_text("{% for m in messages %}lazy {{ m['content'] }} {% endfor %}")
    try:
        found = Calibration(file, 9, 1).tokens(tuned).flatten()
        assert AutoTokenizer.from_pretrained(tuned).decode(found) == "the quick fox lazy the dog lazy runs far"
        file.write_text('{"prompt": "the dog"}\n')
        with pytest.raises(
            CheckpointError, match="line 1: expected an object with text, messages, or prompt and completion"
        ):
            Calibration(file, 1, 1).tokens(tuned)
        (tuned / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
        file.write_text('{"messages": []}\n{"messages": [{"role": "user", "content": "?"}]}\n')
        with pytest.raises(CheckpointError, match="line 1"):
            Calibration(file, 1, 1).tokens(tuned)
    finally:
        (tuned / "chat_template.jinja").unlink()


def test_the_command(language_pair, tmp_path, capsys):
    root, base, tuned = language_pair
    command = ["delta", "compress", str(base), str(tuned), "-o", str(tmp_path / "d"), "--auto"]
    text = ["--calibration", str(root / "text.txt"), "--calibration-tokens", "256"]
    for wrong, word in (
        ([], "--auto needs a text"),
        ([*text, "--ratio", "8"], "give --bytes-ratio in place of --ratio"),
        ([*text, "--beta", "0.5"], "--auto chooses --beta itself"),
    ):
        assert main([*command, *wrong]) == 1
        assert word in capsys.readouterr().err
    assert main([*command, *text, "--bytes-ratio", "4", "--method", "lowrank"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("KL to the fine-tune") < printed.index("lowrank value_dtype=")
    verify(tmp_path / "d")
