"""What a model is asked before the decision, and the features that its answers become.

| probe | asked | features |
|---|---|---|
| peek | with tools, one token with log-probabilities | probability that a tool call begins |
| draft | without tools, greedy, with log-probabilities | confidence in the words of a direct answer |
| samples | without tools, k times at a temperature | agreement of the answers (semantic entropy, exact-match clusters) |
| ptrue | the draft shown, right or wrong? | P(Yes) / (P(Yes) + P(No)), Kadavath et al. 2022 |
| hidden | a probe on the hidden state, where the engine has one | its score |
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from steering.gate.answers import cluster_key
from steering.gate.features import STATIC_FEATURES

Probe = Literal["peek", "draft", "samples", "ptrue", "hidden"]
StageName = Literal["static", Probe]
PROBES: tuple[Probe, ...] = get_args(Probe)
STAGES: tuple[StageName, ...] = ("static", *PROBES)
TOP_OF_ONE = 20  # alternatives that peek and ptrue read of their one token: the most that OpenAI's API returns
FEATURES: dict[str, tuple[str, ...]] = {
    "static": STATIC_FEATURES,
    "peek": ("peek.p_call",),
    "draft": (
        *("draft.mean_logprob", "draft.min_prob", "draft.max_entropy", "draft.tokens"),
        *("draft.refusal", "draft.finished"),
    ),
    "samples": ("samples.top_share", "samples.clusters", "samples.entropy"),
    "ptrue": ("ptrue.p_true",),
    "hidden": ("hidden.score",),
}
Scale = Literal["linear", "log", "-log", "logit"]
# Where a model is sure these differ by factors: on a linear scale 0.9999 and 0.99 are one, and the wrong among the sure are lost.
SCALES: dict[str, Scale] = {
    "peek.p_call": "logit",
    "draft.mean_logprob": "-log",
    "draft.min_prob": "logit",
    "draft.max_entropy": "log",
    "ptrue.p_true": "logit",
    "hidden.score": "logit",
}
_LEAST = 1e-6  # what is smaller counts as this
_REFUSAL = re.compile(
    r"\b(i (?:do not|don't|cannot|can't|can not|am not able|'m not able|am unable|'m unable|do not have|don't have)|as an ai"
    r"|not sure|no information|unable to|real-time|i'm sorry|i am sorry|knowledge cut-?off|would need to)\b",
    re.IGNORECASE,
)
_QUESTION = "Is the answer above right? Reply with one word: Yes or No."


@dataclass(frozen=True)
class Peek:
    """`p_call`: probability mass of a tool call's first token (see `call_mass`)."""

    p_call: float
    prompt_tokens: int = 0
    completion_tokens: int = 1

    def features(self) -> dict[str, float]:
        return {"peek.p_call": self.p_call}


@dataclass(frozen=True)
class Draft:
    """A greedy answer. `logprobs`: of each token; `tops`: of each token the returned alternatives, itself among them.

    `stopped`: these are its first tokens, left there because the rest could not change the decision (gate/ceiling.py).
    """

    text: str
    logprobs: tuple[float, ...]
    tops: tuple[tuple[float, ...], ...]
    finished: bool
    prompt_tokens: int = 0
    stopped: bool = False

    @property
    def completion_tokens(self) -> int:
        return len(self.logprobs)

    def features(self) -> dict[str, float]:
        """An empty draft has no doubt in it, and 0 tokens to tell it by."""
        count = len(self.logprobs)
        return {
            "draft.mean_logprob": sum(self.logprobs) / count if count else 0.0,
            "draft.min_prob": math.exp(min(self.logprobs, default=0.0)),
            "draft.max_entropy": max(map(_entropy, self.tops), default=0.0),
            "draft.tokens": math.log1p(count),
            "draft.refusal": float(_REFUSAL.search(self.text) is not None),
            "draft.finished": float(self.finished),
        }


@dataclass(frozen=True)
class Samples:
    texts: tuple[str, ...]
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def features(self) -> dict[str, float]:
        """Entropy in nats over clusters of equal answers. Raises ValueError without a text."""
        if not self.texts:
            raise ValueError("no sample")
        counts = Counter(map(cluster_key, self.texts)).values()
        shares = [count / len(self.texts) for count in counts]
        return {
            "samples.top_share": max(shares),
            "samples.clusters": float(len(shares)),
            "samples.entropy": -sum(share * math.log(share) for share in shares),
        }


@dataclass(frozen=True)
class PTrue:
    """Probability masses of the two words (see `yes_and_no`)."""

    p_yes: float
    p_no: float
    prompt_tokens: int = 0
    completion_tokens: int = 1

    def features(self) -> dict[str, float]:
        """0.5 where neither word is among the tokens that were returned."""
        total = self.p_yes + self.p_no
        return {"ptrue.p_true": self.p_yes / total if total > 0 else 0.5}


@dataclass(frozen=True)
class Hidden:
    """Score in 0..1 of a probe on the hidden state."""

    score: float
    prompt_tokens: int = 0
    completion_tokens: int = 1

    def features(self) -> dict[str, float]:
        return {"hidden.score": self.score}


Signal = Peek | Draft | Samples | PTrue | Hidden
PROBE_OF: dict[type[Signal], Probe] = {
    Peek: "peek",
    Draft: "draft",
    Samples: "samples",
    PTrue: "ptrue",
    Hidden: "hidden",
}


def scaled(value: float, scale: Scale) -> float:
    """A feature as a model weighs it: log of a number >= 0, -log of minus a number <= 0, or logit of a share. All of them rise."""
    match scale:
        case "log":
            return math.log(max(value, _LEAST))
        case "-log":
            return -math.log(max(-value, _LEAST))
        case "logit":
            share = min(max(value, _LEAST), 1 - _LEAST)
            return math.log(share / (1 - share))
        case "linear":
            return value


def refused_for_good(text: str) -> bool:
    """Whether words of refusal stand in a text however it goes on: at its very end a word may still grow into another."""
    return any(found.end() < len(text) for found in _REFUSAL.finditer(text))


def ptrue_messages(messages: Sequence[Mapping[str, Any]], draft: str) -> list[Mapping[str, Any]]:
    """The dialogue with the draft as its answer, and the question whether it is right."""
    return [*messages, {"role": "assistant", "content": draft}, {"role": "user", "content": _QUESTION}]


def yes_and_no(top: Iterable[tuple[str, float]]) -> tuple[float, float]:
    """Probabilities of Yes and No in any spelling, from (token text, log-probability) of the first token."""
    masses = {"yes": 0.0, "no": 0.0}
    for text, logprob in top:
        word = text.strip().lower()
        if word in masses:
            masses[word] += math.exp(logprob)
    return masses["yes"], masses["no"]


def call_mass(top: Iterable[tuple[str, float]], marker: str) -> float:
    """Probability of the tokens that begin `marker` (`<tool_call>`), from (token text, log-probability).

    Where the marker is several tokens this is the first one's probability, so an upper bound of the call's.
    """
    begins = (math.exp(logprob) for text, logprob in top if text.strip() and _begins(marker, text.strip()))
    return min(sum(begins), 1.0)


def _begins(marker: str, text: str) -> bool:
    return marker.startswith(text) or text.startswith(marker)


def _entropy(logprobs: Sequence[float]) -> float:
    """Nats; what was not returned counts as one more token, so this is a lower bound. NaN where a share is."""
    shares = [math.exp(logprob) for logprob in logprobs]
    shares.append(max(1.0 - sum(shares), 0.0))
    return -sum(share * math.log(share) for share in shares if not share <= 0)
