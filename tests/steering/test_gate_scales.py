"""Features on the scale that tells sure answers apart: what a fit makes of it, and policies that say nothing of scales."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.gate import stages
from steering.gate.cascade import raw_score
from steering.gate.features import static_features
from steering.gate.fit import FitSettings, fit
from steering.gate.policy import read_policy
from steering.gate.signals import SCALES, Draft, Scale, scaled
from tests.steering.gate_world import document, labels, rows


@pytest.mark.parametrize(
    ("scale", "value", "expected"),
    [
        ("linear", -0.25, -0.25),
        ("log", math.exp(-3), -3),
        ("log", 0.0, math.log(1e-6)),
        ("-log", -math.exp(-3), 3),
        ("-log", -math.exp(2), -2),
        ("-log", 0.0, -math.log(1e-6)),
        ("-log", -math.inf, -math.inf),
        ("logit", 0.5, 0),
        ("logit", 0.9, math.log(9)),
        ("logit", 1.0, math.log((1 - 1e-6) / 1e-6)),
        ("logit", 0.0, math.log(1e-6 / (1 - 1e-6))),
    ],
)
def test_values(scale: Scale, value: float, expected: float) -> None:
    assert scaled(value, scale) == pytest.approx(expected)


@given(st.sampled_from(["log", "-log", "logit", "linear"]), st.floats(0, 1), st.floats(0, 1))
def test_every_scale_rises(scale: Scale, one: float, other: float) -> None:
    """The ceiling of a draft takes the end of a feature's range for the end of its weight."""
    low, high = sorted((one, other))
    if scale == "-log":
        low, high = -high, -low
    assert scaled(low, scale) <= scaled(high, scale)


def sure_rows(count: int) -> list[dict[str, Any]]:
    """Right answers with hardly a doubt, wrong ones with twenty times as much, which is still little, and guesses. What is guessed
    has more digits, so that these count for the model as well."""
    random = np.random.default_rng(3)
    found = rows(count, stages=())
    for number, row in enumerate(found):
        kind = ("right", "sure", "right", "guess")[number % 4]
        question = f"What is {'7' * int(random.integers(1, 7) + 4 * (kind == 'guess'))} + 1?"
        row["features"]["static"] = static_features([{"role": "user", "content": question}], [], {}, ())
        doubt = {"right": 3e-4, "sure": 8e-3, "guess": 1.0}[kind] * float(np.exp(random.normal(0, 0.5)))
        draft = Draft("8", (-doubt,), ((-doubt,),), True)
        row["features"]["draft"], row["tokens"]["draft"] = draft.features(), 1
        known = kind == "right"
        row |= {"p_known": float(known), "correct_without": known, "correct_with": True, "called": True, "m": [1]}
        row["n"] = 0 if known else 1
    return found


def test_the_wrong_among_the_sure_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = labels(tmp_path, sure_rows(400))
    settings = FitSettings(stages=("draft",), l2=10)
    fitted = fit(found, settings)
    (stage,) = fitted.policy.stages
    assert {one.name: one.scale for one in stage.features if one.scale != "linear"} == {
        name: scale for name, scale in SCALES.items() if name.startswith("draft.")
    }
    assert fitted.effects.suppressed.value > 0.4  # of the half that is right
    monkeypatch.setattr(stages, "SCALES", {})
    assert fit(found, settings).effects.suppressed.value < 0.2


def test_a_policy_that_names_no_scale_weighs_the_values_as_they_are() -> None:
    made = read_policy(json.dumps(document()).encode())
    (_, drafted) = made.stages
    assert [one.scale for one in drafted.features] == ["linear"]
    assert raw_score(drafted, {"draft.mean_logprob": -0.3}) == pytest.approx(1 / (1 + math.exp(-(10 * -0.3 + 3))))
