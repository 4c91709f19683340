"""Label rows: strict on reading, with the line named."""

import json
from pathlib import Path
from typing import Any

import pytest

from steering.errors import LabelError
from steering.gate.labels import read_labels, row_line
from tests.steering.gate_world import rows, write_rows


def test_rows_survive_writing(tmp_path: Path) -> None:
    first = read_labels(write_rows(tmp_path / "a.jsonl", rows(3)))
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(row_line(row) for row in first.rows))  # empty lines are skipped
    again = read_labels(tmp_path / "b.jsonl")
    assert again.rows == first.rows
    assert again.sha256 != first.sha256


NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p_know": 0.5}, "unknown key 'p_know', did you mean 'p_known'?"),
        ({"model": {"nam": "x"}}, "unknown key 'model.nam', did you mean 'name'?"),
        ({"probes": {"kk": 1}}, "unknown key 'probes.kk'"),
        ({"p_known": 1.5}, "p_known: "),
        ({"p_known": NAN}, "p_known: Input should be a finite number"),
        ({"p_known": "0.5"}, "p_known: "),
        ({"correct_without": 1}, "correct_without: "),
        ({"propensity": 0}, "propensity: "),
        ({"propensity": 1.2}, "propensity: "),
        ({"id": ""}, "id: "),
        ({"id": "q0"}, "'q0' stands in line 1 as well"),
        ({"kinds": {"a": "maths"}}, "kinds.a: "),
        ({"features": {}}, "features.static: Field required"),
        ({"features": {"draft": {}}}, "features.static: Field required"),
        ({"features": {"statics": {}}}, "features.statics"),
        ({"m": [0], "called": True}, "called contradicts m"),
        ({"probes": None}, "probes: how the features were asked for is missing"),
        ({"tokens": {}}, "tokens: draft is missing"),
        ({"tokens": {"draft": -1}}, "tokens.draft: "),
        ({"schema_version": 2}, "schema_version: "),
    ],
)
def test_bad_rows_are_named_by_line_and_field(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    found = rows(3)
    found[2] |= change
    with pytest.raises(LabelError, match=r"bad\.jsonl, line 3: ") as refused:
        read_labels(write_rows(tmp_path / "bad.jsonl", found))
    assert message in str(refused.value)


def test_features_are_complete_and_known(tmp_path: Path) -> None:
    for name, value, message in (
        ("draft.tokens", None, "features.draft: draft.tokens is missing"),
        ("draft.token", 1.0, "unknown feature 'draft.token', did you mean 'draft.tokens'?"),
        ("draft.tokens", NAN, "features.draft.draft.tokens: Input should be a finite number"),
    ):
        found = rows(1)
        found[0]["features"]["draft"][name] = value
        if value is None:
            del found[0]["features"]["draft"][name]
        with pytest.raises(LabelError) as refused:
            read_labels(write_rows(tmp_path / "bad.jsonl", found))
        assert message in str(refused.value)


def test_files_that_hold_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    for content, message in (
        (b"", "holds no row"),
        (b"\n\n", "holds no row"),
        (b"[1]\n", "line 1: "),
        (b"\xff\xfe\n", "line 1: "),
        (json.dumps(rows(1)[0])[:-5].encode(), "line 1: Invalid JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(LabelError, match=message):
            read_labels(path)
    with pytest.raises(LabelError, match="cannot read"):
        read_labels(tmp_path / "none.jsonl")
    with pytest.raises(LabelError, match="cannot read"):
        read_labels(tmp_path)
