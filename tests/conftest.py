"""How tests are spread over processes: a file stays whole, and files that share an engine stay together, the longest first."""

import gc
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

_ENGINES = {
    "world": ("test_added_tokens", "test_combined_engine", "test_whole"),
    "base_server": ("test_demo", "test_gate_engine", "test_tools_engine"),
    "tiny_engine": ("test_edit_truths", "test_four_parts", "test_sampling_engine", "test_truths"),
    "residency": ("test_residency_engine",),
    "triton": ("test_triton_engine",),
}
SCOPES = {f"tests/engine/{name}.py": engine for engine, names in _ENGINES.items() for name in names}
ORDER = list(SCOPES)


class ByEngine(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return SCOPES.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByEngine:
    config.option.loadscopereorder = False  # by the number of tests, which says nothing of the time
    return ByEngine(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one process alone begins with what fails soon
        items.sort(key=lambda item: _turn(item.nodeid.split("::")[0]))


def pytest_collection_finish() -> None:
    gc.freeze()  # torch, transformers and vLLM are a million objects, which every full collection would search again


def _turn(file: str) -> int:
    return ORDER.index(file) if file in SCOPES else len(ORDER)
