"""`deltaworks bench kernel` on a small tensor: every form in a table and in the JSON."""

import json

import pytest
import torch

from compressors.kernels import measure
from server.cli import main


def test_every_form_is_measured_against_the_base(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measure, "_SECONDS", 0.0)
    monkeypatch.setattr(
        "sys.argv",
        [
            "deltaworks",
            "bench",
            "kernel",
            "--out-features",
            "48",
            "--in-features",
            "32",
            "--level",
            "portable",
            "--density",
            "0.5",
            "--rows",
            "1",
            "20",
            "--json",
            str(tmp_path / "rows.json"),
        ],
    )
    assert main() == 0
    printed = capsys.readouterr().out
    assert "rows of one delta: 20" in printed
    assert "0.50" in printed
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == 2 * (2 + 1 + len(measure.FORMS))
    assert {row["ratio_to"] for row in rows} == {None, measure.BASE}
    assert all(row["value"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--device", "cuda"], "torch finds no GPU"),
        (["--device", "cuda", "--level", "avx2"], "--level is for CPUs"),
        (["--deltas", "4"], "--deltas is for --device cuda"),
    ],
)
def test_what_cannot_be_measured_is_said(monkeypatch, capsys, options, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["deltaworks", "bench", "kernel", *options])
    assert main() == 1
    assert reason in capsys.readouterr().err
