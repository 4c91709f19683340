"""One task, asked in every way that a label row needs: without its gateable tools, with all, and the probes of each stage."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steering.gate.answers import right
from steering.gate.dialogue import proposed, tool_name
from steering.gate.endpoint import Answer, Endpoint, pointed
from steering.gate.features import static_features
from steering.gate.labels import LabelModel, LabelRow
from steering.gate.policy import ProbeSettings
from steering.gate.signals import (
    PROBE_OF,
    TOP_OF_ONE,
    Draft,
    Hidden,
    Peek,
    Probe,
    PTrue,
    Samples,
    Signal,
    StageName,
    call_mass,
    ptrue_messages,
    yes_and_no,
)
from steering.gate.tasks import Task
from steering.gate.tools import Toolbox


@dataclass(frozen=True)
class Pointers:
    """Where in an answer's body (JSON Pointers) the server says what it is, and the score of a hidden-state probe.

    What it is stands in answers with tools: without them another template may render the prompt. The score stands in the
    greedy answer without tools; ours gives it under the default pointer where `extra` asks for a conflict score.
    """

    base_fingerprint: str = "/gateway/base_fingerprint"
    delta_digest: str = "/gateway/delta_digest"
    template_sha256: str = "/gateway/template_sha256"
    hidden: str = "/gateway/conflict/score"


@dataclass(frozen=True)
class Asking:
    """`k` sampled answers without tools and `k_with` (None: as many) with them, each next to a greedy one.

    A policy needs the greedy run with tools only; sampled ones say how many calls an answer takes. `extra` goes into every request.
    """

    model: str
    k: int = 8
    k_with: int | None = None
    temperature: float = 0.7
    answer_tokens: int = 256
    max_rounds: int = 6
    seed: int = 0
    skip: tuple[Probe, ...] = ()
    probes: ProbeSettings = field(default_factory=ProbeSettings)
    pointers: Pointers = Pointers()
    extra: Mapping[str, Any] | None = None

    @property
    def counts(self) -> tuple[int, int]:
        """Answers without tools and runs with them, the greedy ones too."""
        return self.k + 1, (self.k if self.k_with is None else self.k_with) + 1


@dataclass(frozen=True)
class Rollout:
    """A run with tools: its last text ("" where it never ended), its calls of gateable tools, and its first answer."""

    answer: str
    calls: int
    first: Answer


class Asker:
    def __init__(self, endpoint: Endpoint, toolbox: Toolbox, asking: Asking) -> None:
        self._endpoint = endpoint
        self._toolbox = toolbox
        self._asking = asking

    async def label(self, task: Task) -> LabelRow:
        """Raises EndpointError."""
        asking = self._asking
        samples = (None, *range(asking.k))
        greedy = await self._say(task, logprobs=asking.probes.top_logprobs)
        kept = [tool for tool in task.tools if tool_name(tool) not in task.gateable]
        if kept:  # what is left where the gate withholds the others, and it may well confuse
            texts = [
                one.answer for one in await asyncio.gather(*(self._rollout(task, kept, index) for index in samples))
            ]
        else:
            sampled = await asyncio.gather(*(self._say(task, sample=index) for index in samples[1:]))
            texts = [one.text for one in (greedy, *sampled)]
        with_samples = (None, *range(asking.counts[1] - 1))
        rollouts = await asyncio.gather(*(self._rollout(task, task.tools, index) for index in with_samples))
        signals = await self._signals(task, greedy)
        without = [right(text, task.gold) for text in texts]
        with_tools = [right(one.answer, task.gold) for one in rollouts]
        calls = [one.calls for one in rollouts]
        needed = [count for count, good in zip(calls, with_tools, strict=True) if good] + [0] * any(without)
        features: dict[StageName, dict[str, float]] = {
            "static": static_features(task.dialogue, task.tools, task.kinds, task.gateable)
        }
        features |= {PROBE_OF[type(signal)]: signal.features() for signal in signals}
        return LabelRow(
            id=task.id,
            question=task.question,
            kinds=task.kinds,
            features=features,
            tokens={PROBE_OF[type(signal)]: signal.completion_tokens for signal in signals},
            p_known=sum(without[1:]) / asking.k,
            correct_without=without[0],
            correct_with=with_tools[0],
            called=calls[0] > 0,
            p_with=sum(with_tools[1:]) / len(with_tools[1:]) if with_tools[1:] else None,
            n=min(needed, default=None),
            m=tuple(calls),
            answers_without=tuple(texts),
            answers_with=tuple(one.answer for one in rollouts),
            probes=asking.probes,
            model=self._model(rollouts[0].first),
        )

    async def _signals(self, task: Task, greedy: Answer) -> list[Signal]:
        """Of every probe that is not skipped and that the server can answer. The probes' samples are not the label's."""
        probes, skip = self._asking.probes, self._asking.skip
        found: list[Signal] = []
        draft = drafted(greedy, probes)
        if "peek" not in skip:
            first = await self._say(task, logprobs=TOP_OF_ONE, max_tokens=1, tools=task.tools)
            found += [Peek(call_mass(first.tokens[0].top, probes.call_marker))] if first.tokens else []
        if "draft" not in skip and draft is not None:
            found.append(draft)
        if "samples" not in skip:
            places = range(self._asking.k, self._asking.k + probes.k)
            answers = await asyncio.gather(
                *(
                    self._say(task, sample=place, max_tokens=probes.max_tokens, temperature=probes.temperature)
                    for place in places
                )
            )
            texts = tuple(one.text for one in answers)
            found.append(Samples(texts, completion_tokens=sum(one.completion_tokens for one in answers)))
        if "ptrue" not in skip and draft is not None:
            messages = ptrue_messages(task.dialogue, draft.text)
            word = await self._say(task, messages=messages, logprobs=TOP_OF_ONE, max_tokens=1)
            found += [PTrue(*yes_and_no(word.tokens[0].top))] if word.tokens else []
        there, score = pointed(greedy.body, self._asking.pointers.hidden)
        if "hidden" not in skip and there and isinstance(score, int | float):
            found.append(Hidden(float(score)))
        return [one for one in found if all(map(math.isfinite, one.features().values()))]

    async def _rollout(self, task: Task, tools: Sequence[Mapping[str, Any]], sample: int | None) -> Rollout:
        messages: list[Mapping[str, Any]] = list(task.dialogue)
        calls = 0
        first: Answer | None = None
        for _ in range(self._asking.max_rounds):
            answer = await self._say(task, messages=messages, sample=sample, tools=tools)
            first = first or answer
            if not answer.tool_calls:
                return Rollout(answer.text, calls, first)
            messages.append(
                {"role": "assistant", "content": answer.text or None, "tool_calls": list(answer.tool_calls)}
            )
            for identifier, call in proposed(answer.tool_calls):
                calls += call.name in task.gateable
                result = await self._toolbox.run(task, call.name, call.arguments)
                messages.append({"role": "tool", "tool_call_id": identifier, "content": result})
        assert first is not None  # there is at least one round
        return Rollout("", calls, first)

    async def _say(
        self,
        task: Task,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        sample: int | None = None,
        logprobs: int | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Answer:
        """Greedy without `sample`; with it, at the temperature and with a seed of task and sample."""
        asking = self._asking
        body: dict[str, Any] = {
            "model": asking.model,
            "messages": list(messages or task.dialogue),
            "max_tokens": max_tokens or asking.answer_tokens,
            "temperature": 0.0 if sample is None else temperature or asking.temperature,
        }
        if sample is not None:
            body["seed"] = seed_of(asking.seed, task.id, sample)
        if logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": logprobs}
        if tools:
            body["tools"] = list(tools)
        return await self._endpoint.chat({**body, **(asking.extra or {})})

    def _model(self, answer: Answer) -> LabelModel:
        pointers = self._asking.pointers
        said = {
            name: pointed(answer.body, getattr(pointers, name))[1]
            for name in ("base_fingerprint", "delta_digest", "template_sha256")
        }
        return LabelModel(
            name=self._asking.model, **{name: value for name, value in said.items() if isinstance(value, str)}
        )


def drafted(greedy: Answer, probes: ProbeSettings) -> Draft | None:
    """The draft that the gate would have seen: the first tokens of the greedy answer. None without log-probabilities."""
    if not greedy.tokens:
        return None
    tokens = greedy.tokens[: probes.max_tokens]
    whole = len(tokens) == len(greedy.tokens)
    return Draft(
        text=greedy.text if whole else "".join(token.text for token in tokens),
        logprobs=tuple(token.logprob for token in tokens),
        tops=tuple(tuple(logprob for _, logprob in token.top) for token in tokens),
        finished=whole and greedy.finish_reason == "stop",
    )


def seed_of(seed: int, task_id: str, sample: int) -> int:
    """The same for the same sample of the same task, whatever was labelled before."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task_id}/{sample}".encode()).digest()[:4], "big") >> 1
