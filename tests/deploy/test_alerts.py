"""The alert rules: explained, and each with a case that promtool runs."""

import subprocess
from pathlib import Path

import yaml

from tests.promtool import promtool

ROOT = Path(__file__).parents[2]
RULES, CASES = ROOT / "deploy/prometheus/alerts.yml", ROOT / "tests/deploy/alerts_test.yml"
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
WANTED = [
    *("GatewayDown", "NotReady", "HighErrorRatio", "TTFTp95High", "QueueSaturated", "RejectionsHigh"),
    *("DeltaLoadFailing", "DeltaThrashing", "DeltaLoadSlow", "ResidentBytesNearBudget", "RetiredGenerationsStuck"),
    *("EngineRestarting", "StoreDiskLow", "AuthFailureSpike", "UploadVerifyFailures", "CancelSlow", "SeriesBudgetNear"),
]


def test_the_alerts_are_all_there_and_explained() -> None:
    assert [rule["alert"] for rule in ALERTS] == WANTED
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_o6_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    fires, silent = set(), set()
    for test in yaml.safe_load(CASES.read_text())["tests"]:
        for case in test["alert_rule_test"]:
            (fires if case["exp_alerts"] else silent).add(case["alertname"])
    assert fires == silent == set(WANTED)


def test_o6_promtool_accepts_the_rules_and_the_cases_hold() -> None:
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(CASES)]):
        done = subprocess.run([promtool(), *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
