"""O1: every metric of the page exists in a live scrape, and the other way round; Prometheus' own lint finds nothing."""

import difflib
import re
import subprocess
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.metrics_page import PAGE, Documented, documented
from tests.promtool import promtool

CHAT = {"model": "tiny-base", "messages": [{"role": "user", "content": "hello"}]}
pytestmark = pytest.mark.anyio


@pytest.fixture
async def exposition(client: httpx.AsyncClient, upload: Any) -> str:
    """Of a gateway where everything that has labels of its own has happened."""
    await upload("red", b"1")
    tools = [{"type": "function", "function": {"name": "f"}}]
    for fields in ({}, {"model": "red"}, {"tools": tools}):
        await client.post("/v1/chat/completions", json={**CHAT, **fields})
    return (await client.get("/metrics")).text


def told(family: Metric) -> Documented:
    labels = {label for sample in family.samples for label in sample.labels} - {"le"}
    return Documented(family.type, tuple(sorted(labels)), family.documentation)


async def test_o1_the_page_is_the_scrape(exposition: str) -> None:
    found = {family.name: told(family) for family in text_string_to_metric_families(exposition)}
    rows = [
        f"| `{name}` | {metric.type} | {' '.join(f'`{label}`' for label in metric.labels)} | {metric.text} |"
        for name, metric in sorted(found.items())
    ]
    page = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| `\w", line)]
    assert list(difflib.unified_diff(page, rows, "the page", "the scrape", lineterm="", n=0)) == []
    assert set(documented()) == set(found)


async def test_every_metric_follows_the_rules(exposition: str) -> None:
    """What `promtool check metrics` looks at, where there is no promtool."""
    for family in text_string_to_metric_families(exposition):
        assert re.fullmatch("(deltaworks|process|python)_[a-z_]+", family.name)
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        assert not re.search("_(counter|gauge|histogram|ms|mb|kb|sec|min|pct|percent)(_|$)", family.name)
        assert family.name.endswith("_total") is False
        if family.type != "histogram":
            assert not family.name.endswith(("_count", "_sum", "_bucket"))
        for sample in family.samples:
            assert set(sample.labels) <= {"le", *told(family).labels}
            assert (family.type == "counter") == sample.name.endswith("_total")


async def test_o1_promtool_finds_nothing(exposition: str) -> None:
    done = subprocess.run(
        [promtool(), "check", "metrics"], input=exposition, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
