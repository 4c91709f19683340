"""Keys that change while the server runs: who may come in from then on, and what a broken file does, which is nothing."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest

from server.config import load_settings
from server.key_files import KeyFiles
from server.keys import hash_key

pytestmark = pytest.mark.anyio


def entry(name: str, **more: str) -> str:
    lines = [f'id = "{name}"', f'hash = "{hash_key(name)}"', *(f"{key} = {value}" for key, value in more.items())]
    return "\n".join(["[[keys]]", *lines, ""])


class Watched:
    """A house whose keys come from two files, which are looked at a hundred times a second."""

    def __init__(self, folder: Path, build: Callable[..., Any]) -> None:
        self.named, self.plain = folder / "keys.toml", folder / "admins"
        self.named.write_text(entry("red", requests_per_minute="1000") + entry("blue"))
        self.plain.write_text("admin\n")
        settings = self._load()
        self.house = build(settings=settings)
        self.reloads = self.house.context.telemetry.key_reloads
        keys = self.house.app.state.keys
        self.files = KeyFiles(keys, settings.auth, lambda: self._load().auth, self.reloads, 0.01)

    def _load(self) -> Any:
        return load_settings(None, {}, {"auth": {"key_file": self.named, "admin_key_file": self.plain}})

    def counted(self, outcome: str) -> float:
        value: float = self.reloads.labels(outcome)._value.get()
        return value

    async def write(self, file: Path, text: str, outcome: str) -> None:
        """And wait until the server has noticed."""
        before = self.counted(outcome)
        file.write_text(text)
        async with asyncio.timeout(5):
            while self.counted(outcome) == before:
                await asyncio.sleep(0.005)

    async def may(self, key: str, path: str = "/v1/models") -> bool:
        async with self.house.client({"authorization": f"Bearer {key}"}) as client:
            status = (await client.get(path)).status_code
        assert status in (200, 401, 403)
        return bool(status == 200)


@pytest.fixture
async def watched(tmp_path: Path, build: Callable[..., Any]) -> AsyncGenerator[Watched, None]:
    watched = Watched(tmp_path, build)
    await watched.house.gateway.start()
    watched.files.start()
    yield watched
    await watched.files.stop()
    await watched.house.gateway.stop()


async def test_a_file_that_changes_is_read_again(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    assert [await watched.may(key) for key in ("red", "blue", "green", "admin")] == [True, True, False, True]
    with caplog.at_level(logging.INFO, logger="deltaworks.keys"):
        await watched.write(watched.named, entry("blue", deltas='["x"]') + entry("green"), "ok")
    assert [await watched.may(key) for key in ("red", "blue", "green", "admin")] == [False, True, True, True]
    assert [record.getMessage() for record in caplog.records] == ["the keys were read again"]
    await watched.write(watched.plain, "other-admin\n", "ok")
    status = "/v1/admin/status"
    assert [await watched.may(key, status) for key in ("admin", "other-admin", "green")] == [False, True, False]
    await asyncio.sleep(0.1)
    assert (watched.counted("ok"), watched.counted("error")) == (2, 0)  # what does not change is not read again


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must hold [[keys]]"),
        (entry("red") + "[[keys]\n", "cannot read the key file"),
        (entry("red") + entry("red"), "given twice"),
        (entry("red") + "limit = 3\n", "unknown setting"),
        (entry("red", scopes='["admin"]'), "inference would be open to everybody"),
    ],
)
async def test_a_broken_file_changes_nothing_and_is_told(
    watched: Watched, caplog: pytest.LogCaptureFixture, text: str, said: str
) -> None:
    await watched.write(watched.named, text, "error")
    assert said in caplog.text
    assert "the keys stay as they were" in caplog.text
    assert hash_key("red") not in caplog.text
    assert [await watched.may(key) for key in ("red", "blue", "nobody")] == [True, True, False]
    await asyncio.sleep(0.05)
    assert watched.counted("error") == 1  # told once
    await watched.write(watched.named, entry("green"), "ok")
    assert [await watched.may(key) for key in ("red", "green")] == [False, True]


async def test_a_file_that_is_away_for_a_moment_takes_no_key(watched: Watched) -> None:
    watched.named.rename(watched.named.with_suffix(".old"))
    async with asyncio.timeout(5):
        while not watched.counted("error"):
            await asyncio.sleep(0.005)
    assert await watched.may("red")
    watched.files.reload()
    async with asyncio.timeout(5):
        while watched.counted("error") < 2:
            await asyncio.sleep(0.005)
    await watched.write(watched.named, entry("red"), "ok")
    assert [await watched.may(key) for key in ("red", "blue")] == [True, False]
