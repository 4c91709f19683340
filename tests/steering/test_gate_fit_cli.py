"""`deltaworks gate fit`, `eval` and `report`."""

import json
import sys
from pathlib import Path

import pytest

from steering.gate.policy import read_policy
from tests.steering.gate_world import gate, rows, write_rows


@pytest.mark.slow
def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_rows(tmp_path / "train.jsonl", rows(1200))
    fresh = write_rows(tmp_path / "fresh.jsonl", rows(600, 5))
    out = tmp_path / "policy.json"
    assert gate("fit", train, "-o", out, "--epsilon", 0.04) == 0
    said = capsys.readouterr()
    for part in ("AUROC", "Brier", "threshold 0.", "overuse alpha*beta", "call rate", "harm at most", f"wrote {out}"):
        assert part in said.out
    made = read_policy(out)
    assert made.policy_id in said.out
    assert gate("eval", out, fresh) == 0
    assert "accuracy" in capsys.readouterr().out
    assert gate("eval", out, fresh, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 600
    assert found["before"]["overuse"]["value"] > found["after"]["overuse"]["value"]
    assert gate("eval", out, train) == 0
    assert "fitted on" in capsys.readouterr().err
    assert gate("report", out, fresh, "-o", tmp_path / "report") == 0
    for name in ("reliability.png", "risk_coverage.png"):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_pictures_of_a_gate_that_never_suppresses(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", rows(100))
    assert gate("fit", train, "-o", tmp_path / "policy.json") == 0
    assert gate("report", tmp_path / "policy.json", train, "-o", tmp_path / "report") == 0
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["risk_coverage.png"]


def test_without_matplotlib_the_report_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_rows(tmp_path / "train.jsonl", rows(600))
    gate("fit", train, "-o", tmp_path / "policy.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert gate("report", tmp_path / "policy.json", train, "-o", tmp_path / "report") == 1
    assert "pip install 'deltaworks[train]'" in capsys.readouterr().err


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_rows(tmp_path / "train.jsonl", rows(300))
    for arguments, message in (
        ((tmp_path / "none.jsonl", "-o", "x"), "cannot read"),
        ((train, "-o", tmp_path / "p.json", "--require", 0.99, "--epsilon", 0.5), "require 0.99 is not below"),
        ((train, "-o", tmp_path / "no" / "p.json"), "No such file"),
        ((train, "-o", tmp_path / "p.json", "--split", "0.5,0.5"), "three splits need shares"),
        ((train, "-o", tmp_path / "p.json", "--explore", 2), "make no policy: explore: "),
        ((train, "-o", tmp_path / "p.json", "--timeout-ms", 0), "make no policy: timeout_ms: "),
        (
            (train, "-o", tmp_path / "p.json", "--stages", "static", "--suppress-mode", "answer_from_draft"),
            "make no policy: suppress_mode: answer_from_draft needs draft",
        ),
        ((train, "-o", tmp_path / "p.json", "--stages", "peek"), "no features of the stage peek"),
    ):
        assert gate("fit", *arguments) == 1
        assert message in capsys.readouterr().err
    for arguments in (
        ("--epsilon", 0),
        ("--delta", 1.5),
        ("--stages", "drafts"),
        ("--suppress-mode", "x"),
        ("--band", "0.9,0.1"),
        ("--band", "1"),
    ):
        with pytest.raises(SystemExit):
            gate("fit", train, "-o", "p.json", *arguments)
    capsys.readouterr()
    assert gate("eval", train, train) == 1
    assert "is not a tool-gate policy" in capsys.readouterr().err
