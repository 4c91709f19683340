"""An engine without a model: says who answers, then fixed words; stops, fails, blocks or dies where it is told."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prometheus_client import Metric

from server.core import FinishReason, RowTimes, Sampling, TokenEvent, TokenLogprob, Window
from server.engine.base import (
    EditReport,
    EngineDeadError,
    EngineDelta,
    EngineEdit,
    EngineError,
    EngineLoadError,
    EngineStep,
    LayerReport,
)
from server.steering import edited_positions


@dataclass(frozen=True)
class Said:
    """What the fake engine says to one request: of every choice the same words, of every word these log-probabilities."""

    words: tuple[str, ...]
    logprob: float = -0.5
    top: tuple[tuple[str, float], ...] = (("x", float("-inf")),)
    block: bool = False
    error: Exception | None = None


class FakeEngine:
    """Says who answers ("base", or the digest's start), then fixed words; stops, fails or blocks where it is told."""

    max_model_len = 64
    dtype = "float32"

    def __init__(self) -> None:
        self.dead = False
        self.starts = 0
        self.start_errors: list[Exception] = []  # of the next starts
        self.start_s = 0.0
        self.kills = 0
        self.signs = 0
        self.calls_open = 0
        self.step_s: float | None = None  # how long a token takes
        self.words = (" one", " two")
        self.texts: dict[int, tuple[str, ...]] = {}  # what a choice says instead, piece by piece
        self.script: Callable[[str], Said | None] = lambda request_id: None  # goes before all of the above
        self.rows: list[str] = []  # ids of requests, in order
        self.generate_error: Exception | None = None
        self.block_at: int | None = None
        self.hold_at: int | None = None  # rows wait there as long as it says so
        self.fail_at: int | None = None
        self.running: set[str] = set()
        self.calls: list[tuple[list[int], Sampling, EngineDelta | None, str | None]] = []
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.hold_loads = False
        self.edits: dict[str, EngineEdit] = {}  # resident ones
        self.edit_loads: list[str] = []
        self.edit_unloads: list[str] = []
        self.edit_error: Exception | None = None
        self.asked: list[EngineEdit | None] = []
        self.score: float | None = 0.5
        self.spoil: Callable[[EditReport], EditReport | None] = lambda report: report
        self._reports: dict[str, EditReport] = {}
        self._resident: set[str] = set()
        self._death = asyncio.Event()

    async def start(self) -> None:
        self.starts += 1
        await asyncio.sleep(self.start_s)
        if self.start_errors:
            raise self.start_errors.pop(0)
        self.dead, self._death = False, asyncio.Event()
        self.edits.clear()
        self._resident.clear()

    async def stop(self) -> None: ...

    def die(self) -> None:
        """As a process that is killed: what it runs fails, and it has forgotten everything."""
        self.dead = True
        self._death.set()

    @property
    def busy(self) -> bool:
        return bool(self.running or self.calls_open)

    def kill(self) -> None:
        self.kills += 1
        self.die()

    def watch(self, observe: Callable[[EngineStep], None]) -> None:
        self.observe = observe

    def own_metrics(self) -> list[Metric]:
        return []

    async def generate(
        self,
        request_id: str,
        ids: Sequence[int],
        sampling: Sampling,
        delta: EngineDelta | None,
        salt: str | None,
        edit: EngineEdit | None = None,
    ) -> AsyncGenerator[TokenEvent, None]:
        self.calls.append((list(ids), sampling, delta, salt))
        self.rows.append(request_id)
        self.asked.append(edit)
        said = self.script(request_id)
        assert delta is None or delta.digest in self._resident
        if edit is not None:
            assert edit.fingerprint in self.edits
            self._reports[request_id] = self._report(edit, len(ids))
        if error := (said.error if said else self.generate_error):
            raise error
        usual = (delta.digest[:6] if delta else "base", *self.words)
        choices = [self.texts.get(index, usual)[: sampling.max_tokens] for index in range(sampling.n)]
        if said is not None:
            choices = [said.words[: sampling.max_tokens]] * sampling.n
        said = said or Said(())
        self.running.add(request_id)
        try:
            for step in range(max(map(len, choices))):
                if step == self.fail_at:
                    raise EngineError("the fake engine fails here")
                while step == self.hold_at:
                    await asyncio.sleep(0.001)
                if step == self.block_at or said.block:
                    await self._death.wait()
                    raise EngineDeadError("the fake engine is dead")
                if self.step_s is not None:
                    await asyncio.sleep(self.step_s)
                self.signs += 1
                reason = FinishReason.LENGTH if step + 1 == sampling.max_tokens else FinishReason.STOP
                for index, words in enumerate(choices):
                    if step >= len(words):
                        continue
                    word = words[step]
                    top = tuple(TokenLogprob(9, text, logprob) for text, logprob in said.top)
                    logprobs = (TokenLogprob(step, word, said.logprob, top),)
                    finish = reason if step + 1 == len(words) else None
                    now = time.monotonic()
                    times = RowTimes(now - 1, now - 0.75, now) if step == 0 else None
                    event = TokenEvent(index, word, (step,), logprobs, finish, len(ids), 1, times=times)
                    if sampling.prompt_logprobs is not None and step == 0:
                        alternatives = top[: sampling.prompt_logprobs]
                        scored = (TokenLogprob(token, chr(token), -0.25, alternatives) for token in ids[1:])
                        event = replace(event, prompt_logprobs=tuple(scored))
                    yield event
        finally:
            self.running.discard(request_id)

    async def measure(self, delta: EngineDelta) -> int:
        return 1000

    async def load(self, delta: EngineDelta) -> int:
        self.loads.append(delta.digest)
        self.calls_open += 1
        while self.hold_loads and not self.dead:
            await asyncio.sleep(0.005)
        self.calls_open -= 1
        self.signs += 1
        if not delta.parts and b"unloadable" in Path(delta.path).read_bytes():
            raise EngineLoadError("the fake engine cannot load this")
        if self.dead:
            raise EngineDeadError("the fake engine is dead")
        self._resident.add(delta.digest)
        return 1000

    async def unload(self, delta: EngineDelta) -> None:
        self.unloads.append(delta.digest)
        self._resident.discard(delta.digest)

    async def load_edit(self, edit: EngineEdit) -> None:
        self.edit_loads.append(edit.fingerprint)
        if self.edit_error:
            raise self.edit_error
        self.edits[edit.fingerprint] = edit

    async def unload_edit(self, edit: EngineEdit) -> None:
        self.edit_unloads.append(edit.fingerprint)
        del self.edits[edit.fingerprint]

    async def edit_report(self, request_id: str) -> EditReport | None:
        report = self._reports.pop(request_id, None)
        return self.spoil(report) if report else None

    def _report(self, edit: EngineEdit, length: int) -> EditReport:
        """A worker's report in which the edit did what its spec says, two latents a row; every step is generated."""
        spec = json.loads(edit.spec)
        score = self.score if spec["probe"] else None
        if not spec["tables"] or (spec["condition"] and (score or 0) < spec["condition"]["at_least"]):
            return EditReport((), (), score, False)
        wanted = spec["prompt"]
        if isinstance(wanted, dict):
            wanted = tuple(wanted["positions"]) if "positions" in wanted else Window(*wanted["window"])
        positions = tuple(edited_positions(wanted, length))
        if spec["generation"]:
            positions += (length, length + 1)
        layers = {table["layer"] for table in spec["tables"] if "sae" in table} or {12, 13}
        rows = len(positions)
        done = tuple(LayerReport(layer, rows, 2 * rows, rows, 0.25) for layer in sorted(layers))
        return EditReport(positions, done, score, True)
