"""Work beside the requests: it starts again where it fails, and stops where it is told to."""

import asyncio
import logging

import pytest

from server.background import Background

pytestmark = pytest.mark.anyio


class Counting(Background):
    what = "counting"

    def __init__(self) -> None:
        self.runs = 0
        self.went_on = asyncio.Event()

    async def run(self) -> None:
        self.runs += 1
        if self.runs < 3:
            raise ZeroDivisionError("a fault of ours")
        self.went_on.set()
        await asyncio.Event().wait()


async def test_what_fails_is_told_and_starts_again(caplog: pytest.LogCaptureFixture) -> None:
    counting = Counting()
    with caplog.at_level(logging.ERROR, logger="deltaworks.background"):
        counting.start()
        await asyncio.wait_for(counting.went_on.wait(), 5)
    assert [record.getMessage() for record in caplog.records] == ["counting failed, and starts again"] * 2
    assert all(record.exc_info for record in caplog.records)
    await counting.stop()
    await asyncio.sleep(0)
    assert counting.runs == 3
