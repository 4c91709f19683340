"""What a request itself tells: features of the question, of the tools and of the dialogue. No model is asked.

Words are English; a question in another language has the counts only. Counts enter as log(1 + n), flags as 0 or 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, get_args

from steering.gate.dialogue import Dict, calls_in, in_tool_loop, last_user_text, text_of, tool_name, tool_text

Kind = Literal["lookup", "compute", "clarify", "state", "action", "unknown"]
GateableKind = Literal["lookup", "compute"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GATEABLE: tuple[GateableKind, ...] = get_args(GateableKind)

_LIMIT = 20_000  # characters of a question that are looked at
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_YEAR = re.compile(r"(?<!\d)(?:1[89]|20)\d\d(?!\d)")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_OPERATOR = re.compile(r"(?<=[\d)])\s*(?:\*\*|[-+*/^%×÷])\s*(?=[\d(])")
_NAME = re.compile(r"(?<=[^\s.!?:]\s)[A-Z][\w-]+")  # capitalised inside a sentence
_FLAGS = {
    "text.recency": r"today|tonight|yesterday|tomorrow|now|current(?:ly)?|latest|recent(?:ly)?|newest|this (?:week|month|year)"
    r"|live|up.to.date|prices?|stock|weather|forecast|temperature|news|scores?|schedule|exchange rate",
    "text.asks_tool": r"(?:use|using|call|run|with) (?:(?:the|a|your|any) )?(?:tools?|function|calculator|browser|search)"
    r"|search (?:the|for|online)|look (?:(?:it|this|that) )?up|google|browse|run (?:the|this|some) code|check online",
    "text.asks_compute": r"calculate|compute|evaluate|solve|sum|product|multipl(?:y|ied)|divided?|times|plus|minus"
    r"|square root|percent(?:age)?|average|how (?:many|much)|total|remainder|factorial",
    "text.asks_fact": r"who|whom|whose|when|where|which|capital of|author of|born|founded|invented|population",
    "text.asks_reason": r"why|explain|describe|summari[sz]e|write|translate|compare|rewrite|draft|poem|story",
    "text.personal": r"my|our|mine|i've|me",
    "text.code": r"python|javascript|sql|code|function|script|regex",
    "text.maths": r"equation|integral|derivative|prime|polynomial",
}
_SIGNS = {"text.code": "|```", "text.maths": r"|\$[^$]+\$|\\frac|\\sqrt"}
_PATTERNS = {
    name: re.compile(rf"\b(?:{words})\b{_SIGNS.get(name, '')}", re.IGNORECASE) for name, words in _FLAGS.items()
}
_STOP = frozenset(
    {
        *("a", "an", "the", "of", "for", "to", "in", "on", "at", "by", "with", "from", "as", "and", "or", "not"),
        *("is", "are", "was", "were", "be", "been", "do", "does", "did", "can", "could", "will", "would", "should"),
        *("what", "who", "whom", "whose", "when", "where", "which", "why", "how", "many", "much", "please", "tell"),
        *("it", "its", "this", "that", "these", "those", "me", "my", "you", "your", "give"),
    }
)

STATIC_FEATURES = (
    *("text.chars", "text.words", "text.numbers", "text.digits", "text.longest_number", "text.operators", "text.names"),
    *("text.has_year", "text.decades_since_2000", "text.question_mark", "text.url", *_FLAGS),
    *("tools.count", "tools.gateable", *(f"tools.{kind}" for kind in KINDS), "tools.overlap", "tools.named"),
    *("loop.user_turns", "loop.system_chars", "loop.calls_used", "loop.results", "loop.repeated", "loop.since_user"),
)


def static_features(
    messages: Sequence[Dict], tools: Sequence[Dict], kinds: Mapping[str, str], gateable: Collection[str]
) -> dict[str, float]:
    """Every one of STATIC_FEATURES. `kinds` names the kind of each tool, `gateable` those that may be withheld."""
    question = last_user_text(messages)[:_LIMIT]
    found = {**_text(question), **_tools(question, tools, kinds, gateable), **_loop(messages)}
    return {name: found[name] for name in STATIC_FEATURES}


def _text(text: str) -> dict[str, float]:
    numbers = _NUMBER.findall(text)
    years = [int(year) for year in _YEAR.findall(text)]
    digits = [sum(map(str.isdigit, number)) for number in numbers]
    return {
        "text.chars": math.log1p(len(text)),
        "text.words": math.log1p(len(_WORD.findall(text))),
        "text.numbers": math.log1p(len(numbers)),
        "text.digits": math.log1p(sum(digits)),
        "text.longest_number": float(min(max(digits, default=0), 30)),
        "text.operators": math.log1p(len(_OPERATOR.findall(text))),
        "text.names": math.log1p(len(_NAME.findall(text))),
        "text.has_year": float(bool(years)),
        "text.decades_since_2000": max(max(years, default=2000) - 2000, 0) / 10,
        "text.question_mark": float("?" in text),
        "text.url": float("http://" in text or "https://" in text),
        **{name: float(pattern.search(text) is not None) for name, pattern in _PATTERNS.items()},
    }


def _tools(
    question: str, tools: Sequence[Dict], kinds: Mapping[str, str], gateable: Collection[str]
) -> dict[str, float]:
    """`overlap`: the largest share of the question's words that a gateable tool's name and description hold."""
    names = [tool_name(tool) for tool in tools]
    words = _content_words(question)
    shares = [
        len(words & _content_words(tool_text(tool))) / len(words)
        for tool, name in zip(tools, names, strict=True)
        if name in gateable and words
    ]
    counts = {kind: sum(kinds.get(name, "unknown") == kind for name in names) for kind in KINDS}
    lowered = question.lower()
    return {
        "tools.count": math.log1p(len(names)),
        "tools.gateable": math.log1p(sum(name in gateable for name in names)),
        **{f"tools.{kind}": math.log1p(count) for kind, count in counts.items()},
        "tools.overlap": max(shares, default=0.0),
        "tools.named": float(any(name and name.lower() in lowered for name in names)),
    }


def _loop(messages: Sequence[Dict]) -> dict[str, float]:
    calls = [(call.name, call.arguments) for call in calls_in(messages)]
    return {
        "loop.user_turns": math.log1p(sum(one.get("role") == "user" for one in messages)),
        "loop.system_chars": math.log1p(
            sum(len(text_of(one)) for one in messages if one.get("role") in ("system", "developer"))
        ),
        "loop.calls_used": math.log1p(len(calls)),
        "loop.results": math.log1p(sum(one.get("role") == "tool" for one in messages)),
        "loop.repeated": float(len(set(calls)) < len(calls)),
        "loop.since_user": float(in_tool_loop(messages)),
    }


def _content_words(text: str) -> set[str]:
    return {word for word in map(str.lower, _WORD.findall(text)) if word not in _STOP and len(word) > 1}
