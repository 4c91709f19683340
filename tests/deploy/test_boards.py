"""The Grafana boards: complete, parseable, and about metrics that exist."""

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tests.metrics_page import documented

ROOT = Path(__file__).parents[2]
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "deploy/grafana").glob("*.json"))}
RULES = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
SUFFIXES = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("_total",)}
# Of Prometheus itself and of its client library, whose own documentation they have.
FOREIGN = {"up", "scrape_samples_scraped"}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions(board: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in panels(board) for target in panel["targets"]]


def parsed(expression: str) -> Any:
    return promql_parser.parse(expression.replace("$__rate_interval", "5m"))


def metrics_of(expression: str) -> set[str]:
    found: set[str] = set()

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.add(node.name)
        return True

    promql_parser.walk(parsed(expression), visit)
    assert found
    return found


def scraped() -> set[str]:
    """Names of samples; that the documented metrics are those of a scrape is another test's matter."""
    return FOREIGN | {
        name + suffix for name, metric in documented().items() for suffix in SUFFIXES.get(metric.type, ("",))
    }


def test_there_are_five_boards() -> None:
    assert set(BOARDS) == {"overview", "deltas", "engine", "steering", "security"}
    assert {board["uid"] for board in BOARDS.values()} == {f"deltaworks-{name}" for name in BOARDS}


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_can_be_provisioned(name: str) -> None:
    board = BOARDS[name]
    assert "id" not in board  # Grafana's own number
    assert board["schemaVersion"] >= 36
    assert (board["refresh"], board["tags"]) == ("10s", ["deltaworks"])
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["DS_PROMETHEUS"]["type"] == "datasource"
    chosen = {"instance", "delta"} if name == "deltas" else {"instance"}
    assert set(variables) == {"DS_PROMETHEUS", *chosen}
    for variable in chosen:
        assert (variables[variable]["includeAll"], variables[variable]["multi"]) == (True, True)
        (metric,) = re.findall(r"label_values\((\w+)", variables[variable]["definition"])
        assert metric in scraped()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_says_what_it_shows(name: str) -> None:
    for panel in panels(BOARDS[name]):
        assert len(panel["description"]) > 10, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source["uid"] == "${DS_PROMETHEUS}" for source in sources)
        at = panel["gridPos"]
        assert 0 <= at["x"] < at["x"] + at["w"] <= 24


@pytest.mark.parametrize("name", BOARDS)
def test_panels_do_not_overlap(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARDS[name]["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("name", BOARDS)
def test_o5_every_expression_parses_and_names_metrics_that_exist(name: str) -> None:
    known = scraped()
    for expression in expressions(BOARDS[name]):
        assert metrics_of(expression) <= known, expression
        assert expression.count('instance=~"$instance"') == len(re.findall(r"[a-z]\{", expression)), expression


def test_o5_every_alert_parses_and_names_metrics_that_exist() -> None:
    for rule in RULES:
        assert metrics_of(rule["expr"]) <= scraped(), rule["alert"]


def test_every_metric_is_on_a_board_or_said_not_to_be() -> None:
    """What nobody looks at need not be measured; these are looked at by hand."""
    shown = {
        metric for board in BOARDS.values() for expression in expressions(board) for metric in metrics_of(expression)
    }
    by_hand = {
        name
        for name in documented()
        if re.match(r"deltaworks_(combination|edit)_|python_|process_", name)
        or name in ("deltaworks_rows_in_flight", "deltaworks_delta_read_duration_seconds")
        or re.fullmatch(r"deltaworks_(profile|sae|policy)_upload_(bytes|duration_seconds)", name)
    }
    for name, metric in documented().items():
        samples = {name + suffix for suffix in SUFFIXES.get(metric.type, ("",))}
        assert samples & shown or name in by_hand, name


def test_other_files_name_metrics_that_exist() -> None:
    known = scraped()
    for path in sorted((ROOT / "deploy").rglob("*")):
        if path.suffix in (".yml", ".yaml", ".md", ".txt", ".tpl") and path.is_file():
            for name in re.findall(r"\bdeltaworks_[a-z_]+\b", path.read_text()):
                assert name in known, f"{path.relative_to(ROOT)}: {name}"
