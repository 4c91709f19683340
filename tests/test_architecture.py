"""The rules of the four houses, read from the syntax trees."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOUSES = ("server", "compressors", "steering", "trainers")
MAY_IMPORT: dict[str, set[str]] = {
    "compressors": set(),
    "steering": set(),
    "server": {"compressors", "steering"},
    "trainers": {"compressors", "steering"},
}
FILES = sorted(path for house in HOUSES for path in (ROOT / house).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# Nothing of these loads torch, vllm or transformers when imported.
LIGHT = (
    "server.app",
    "server.cli",
    "server.ray.edge",
    *(f"compressors.{name}" for name in ("artifact", "fingerprint", "masks", "errors", "verify", "base", "cli")),
    *(f"steering.{name}" for name in ("toolgate", "gate.fit", "gate.label", "gate.label_cli")),
)
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
VAGUE = {"utils", "util", "common", "helpers", "helper", "managers", "misc"}
OUTERMOST = {"server/access.py", "server/sse.py"}  # where any error at all is turned into an answer
FAIL_OPEN = {"server/gate_run.py"}  # where any error at all leaves the request as it came


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.module


def importers(package: str) -> set[str]:
    return {name_of(path) for path in FILES if any(name.split(".")[0] == package for name in imports(path))}


def test_houses_import_only_whom_they_may_know() -> None:
    for path in FILES:
        house = path.relative_to(ROOT).parts[0]
        known = {name.split(".")[0] for name in imports(path)} & set(HOUSES)
        assert known - {house} <= MAY_IMPORT[house], name_of(path)


def test_fastapi_stays_at_the_edge() -> None:
    edge = ("server/app.py", "server/auth.py", "server/errors.py", "server/routes/", "server/ray/edge.py")
    for package in ("fastapi", "starlette"):
        assert [name for name in sorted(importers(package)) if not name.startswith(edge)] == []


def test_torch_and_vllm_stay_where_they_belong() -> None:
    torch_homes = ("compressors/", "steering/", "trainers/", "server/engine/worker/")
    assert [name for name in sorted(importers("torch")) if not name.startswith(torch_homes)] == []
    vllm_homes = ("server/engine/", "server/bench/")
    assert [name for name in sorted(importers("vllm")) if not name.startswith(vllm_homes)] == []


def test_ray_stays_in_its_own_package() -> None:
    assert [name for name in sorted(importers("ray")) if not name.startswith("server/ray/")] == []


def test_importing_the_edge_loads_nothing_heavy() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        "    for heavy in {'torch', 'vllm', 'transformers'} & set(sys.modules):\n"
        "        sys.exit(f'importing {name} loads {heavy}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_files_and_functions_are_short() -> None:
    long_files = [name_of(path) for path in FILES + TESTS if len(path.read_text().splitlines()) > MAX_FILE_LINES]
    assert long_files == []
    long_functions = [
        f"{name_of(path)}:{node.lineno} {node.name}"
        for path in FILES + TESTS
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long_functions == []


def test_names_say_what_is_inside() -> None:
    assert [name_of(path) for path in FILES if VAGUE & {*path.relative_to(ROOT).parent.parts, path.stem}] == []


def test_only_the_outermost_handlers_catch_everything() -> None:
    def swallows_all(node: ast.ExceptHandler) -> bool:
        last = node.body[-1]
        if isinstance(last, ast.Raise) and last.exc is None:
            return False  # cleans up and passes the error on
        caught = ast.dump(node.type) if node.type else "'Exception'"
        return "'Exception'" in caught or "'BaseException'" in caught

    catching = {
        name_of(path)
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler) and swallows_all(node)
    }
    assert catching == OUTERMOST | FAIL_OPEN


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in TESTS if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
    assert not list((ROOT / "tests").rglob("__init__.py"))
