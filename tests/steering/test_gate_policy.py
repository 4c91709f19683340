"""A policy file: what it says is kept, what it gets wrong is named."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from steering.errors import PolicyError
from steering.gate.policy import mismatch, policy_bytes, read_policy, write_policy
from tests.steering.gate_world import document, policy, stage


def test_the_id_is_the_digest_of_the_written_file_and_survives_formatting(tmp_path: Path) -> None:
    made = policy()
    write_policy(made, tmp_path / "policy.json")
    written = (tmp_path / "policy.json").read_bytes()
    assert hashlib.sha256(written).hexdigest() == made.policy_id
    (tmp_path / "pretty.json").write_text(json.dumps(json.loads(written), indent=4))
    again = read_policy(tmp_path / "pretty.json")
    assert again == made
    assert again.policy_id == made.policy_id
    assert policy(explore=0.5).policy_id != made.policy_id


def test_kinds_go_by_the_first_pattern_and_only_knowledge_is_gateable() -> None:
    made = policy()
    assert made.kind_of("calculator") == ("compute", True)
    assert made.kind_of("search") == ("lookup", True)
    assert made.kind_of("private_search") == ("lookup", False)
    assert made.kind_of("ask_user") == ("clarify", False)
    assert made.kind_of("send_mail") == ("action", False)
    assert made.kind_of("Calculator") == made.kind_of("") == ("unknown", False)


def test_a_policy_holds_for_one_model_only() -> None:
    made = policy()
    assert mismatch(made, "sha256:base", None, "f" * 64) is None
    for served, named in (
        (("sha256:other", None, "f" * 64), "fitted for base sha256:base, served is sha256:other"),
        (("sha256:base", "d" * 64, "f" * 64), f"fitted for delta none, served is {'d' * 64}"),
        (("sha256:base", None, ""), "served is none"),
    ):
        reason = mismatch(made, *served)
        assert reason is not None
        assert named in reason


def changed(path: str, value: Any) -> bytes:
    """The document with one value replaced, or added; DELETE removes it."""
    whole = document()
    *parents, last = path.split(".")
    at: Any = whole
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at[part]
    if value == "DELETE":
        del at[last]
    elif isinstance(at, list):
        at[int(last)] = value
    else:
        at[last] = value
    return json.dumps(whole).encode()


NAN = float("nan")
BAD = [
    ("tresholds", {}, "unknown key 'tresholds', did you mean 'thresholds'?"),
    ("model.base_fingerprnt", "x", "unknown key 'model.base_fingerprnt', did you mean 'base_fingerprint'?"),
    ("stages.1.isotonic.z", [], "unknown key 'stages.1.isotonic.z', known: x, y"),
    ("probes.timeout", 1, "unknown key 'probes.timeout', did you mean 'timeout_ms'?"),
    ("budgets", {"action": 1}, "budgets.action"),
    ("budgets", {"lookup": -1}, "budgets.lookup"),
    ("schema_version", 2, "schema_version"),
    ("stages", "DELETE", "stages: Field required"),
    ("stages", [], "stages: "),
    ("thresholds", "DELETE", "thresholds: Field required"),
    ("model.delta_digest", "DELETE", "model.delta_digest: Field required"),
    ("thresholds.suppress", 1.2, "thresholds.suppress: "),
    ("thresholds.suppress", -0.1, "thresholds.suppress: "),
    ("thresholds.suppress", "0.8", "thresholds.suppress: "),
    ("thresholds.suppress", NAN, "thresholds.suppress: Input should be a finite number"),
    ("thresholds.require", 0.8, "thresholds: require must be below suppress"),
    ("thresholds.suppress", 0.92, "stages.0: thresholds.suppress 0.92 is outside lo 0.1 to hi 0.9"),
    ("stages.1.lo", 0.85, "stages.1: thresholds.suppress 0.8 is outside lo 0.85"),
    ("stages.1.hi", 0.05, "stages.1: lo is above hi"),
    ("stages.0.logistic.weights", [1, 2], "stages.0: logistic.weights: 2 values for 1 features"),
    ("stages.0.logistic.weights", [NAN], "stages.0.logistic.weights.0: Input should be a finite number"),
    ("stages.0.logistic.bias", float("inf"), "stages.0.logistic.bias: Input should be a finite number"),
    ("stages.0.features", [], "stages.0.features: "),
    ("stages.0.features.0.std", 0, "stages.0.features.0.std: "),
    ("stages.0.features.0.std", "DELETE", "stages.0.features.0.std: Field required"),
    ("stages.0.features.0.name", "text.digit", "unknown feature 'text.digit', did you mean 'text.digits'?"),
    ("stages.0.features.0.name", "draft.min_prob", "stages.0.features.0.name: draft.min_prob is not known yet"),
    ("stages.0.isotonic.x", [0, 0], "stages.0.isotonic: x must rise strictly"),
    ("stages.0.isotonic.y", [1, 0], "stages.0.isotonic: y must not fall"),
    ("stages.0.isotonic.y", [0, 0.5, 1], "stages.0.isotonic: y has 3 values, x has 2"),
    ("stages.0.isotonic.y", [0, 1.5], "stages.0.isotonic.y.1: "),
    ("stages.0.name", "samples", "stages.0.name: samples is not in probes.order"),
    ("stages", [stage("draft", hi=1.0), stage("static")], "stages: draft, static are not in the order static, draft"),
    ("stages", [stage("static")], "probes.order: draft is asked, and no stage uses it"),
    ("probes.order", ["draft", "draft"], "probes: order: a probe stands there twice"),
    ("probes.order", ["ptrue", "draft"], "probes: order: ptrue needs draft before it"),
    ("probes.order", ["drafts"], "probes.order.0: "),
    ("probes.k", 0, "probes.k: "),
    ("probes.max_tokens", 1.5, "probes.max_tokens: "),
    ("tool_kinds.0.kind", "maths", "tool_kinds.0.kind: "),
    ("tool_kinds.4.gateable", True, "tools of kind 'action' are never withheld"),
    ("suppress_mode", "hide", "suppress_mode: "),
    ("placement", "mid", "placement: "),
    ("explore", 1.01, "explore: "),
    ("eval", {"n": 1}, "eval.alpha: Field required"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=[f"{path}={value}"[:60] for path, value, _ in BAD])
def test_bad_policies_are_refused_by_field(path: str, value: Any, message: str) -> None:
    with pytest.raises(PolicyError) as refused:
        read_policy(changed(path, value))
    assert message in str(refused.value)


def test_what_is_no_policy_at_all(tmp_path: Path) -> None:
    for content in (b"", b"[]", b"{", b"\x80\x04.", b'"x"', b"[" * 100_000):
        with pytest.raises(PolicyError, match="is not a tool-gate policy"):
            read_policy(content)
    with pytest.raises(PolicyError, match="larger than"):
        read_policy(b" " * (5 << 20))
    with pytest.raises(PolicyError, match=r"none\.json"):
        read_policy(tmp_path / "none.json")


def test_an_answer_from_the_draft_needs_a_draft() -> None:
    with pytest.raises(PolicyError, match="suppress_mode: answer_from_draft needs draft"):
        policy(stages=[stage("static")], probes={}, suppress_mode="answer_from_draft")


def test_defaults_are_written_out() -> None:
    written = json.loads(policy_bytes(policy(probes={}, stages=[stage("static")])))
    assert written["suppress_mode"] == "drop_tools"
    assert "mixed" not in written  # came later: a policy without it keeps its id
    assert json.loads(policy_bytes(policy(mixed="allow")))["mixed"] == "allow"
    assert written["probes"]["timeout_ms"] == 2000
    assert written["thresholds"] == {"require": None, "suppress": 0.8}
