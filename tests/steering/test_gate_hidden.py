"""The hidden-state stage: fitted like the others, and bound to the profile whose probe a server reads for it."""

import random
from pathlib import Path
from typing import Any

import pytest

from steering.gate.policy import ProbeSettings, read_policy
from tests.steering.gate_world import gate, rows, write_rows

PROFILE = "a" * 64


def with_hidden(count: int) -> list[dict[str, Any]]:
    """A score that knows what is known, but for some noise."""
    noise = random.Random(0)
    found = rows(count, stages=())
    for row in found:
        score = min(max(row["p_known"] + noise.gauss(0, 0.2), 0), 1)
        row["features"]["hidden"], row["tokens"]["hidden"] = {"hidden.score": score}, 1
    return found


def test_a_fit_names_the_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels, out = write_rows(tmp_path / "labels.jsonl", with_hidden(600)), tmp_path / "policy.json"
    assert gate("fit", labels, "-o", out, "--hidden-profile", PROFILE) == 0
    made = read_policy(out)
    assert (made.probes.order, made.probes.hidden_profile) == (("hidden",), PROFILE)
    assert made.stages[-1].name == "hidden"
    assert "no profile is named" not in capsys.readouterr().err
    assert gate("fit", labels, "-o", out) == 0
    assert read_policy(out).probes.hidden_profile is None
    assert "no profile is named whose probe the stage hidden reads" in capsys.readouterr().err


@pytest.mark.parametrize("bad", ["knows", "A" * 64, "a" * 63])
def test_a_profile_is_named_by_its_digest(tmp_path: Path, bad: str) -> None:
    with pytest.raises(SystemExit):
        gate("fit", tmp_path / "labels.jsonl", "-o", tmp_path / "policy.json", "--hidden-profile", bad)


def test_it_takes_one_token() -> None:
    assert ProbeSettings().most_tokens("hidden") == 1
