"""Short answers in free text: what the answer is, whether two are the same, whether one is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Context, Decimal, InvalidOperation

from steering.matching import normalised

_MARKED = re.compile(r"(?:####|\banswer(?:\s+is)?\s*[:=]|\banswer\s+is\b|\\boxed\s*\{)\s*([^\n]*)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")
_EXACT = re.compile(rf"[$€£]?\s*({_NUMBER.pattern})\s*[%$€£]?")


def final_answer(text: str) -> str:
    """What follows the last `answer is`, `answer:`, `####` or `\\boxed{`, up to the line's end; else the whole text."""
    return _stripped(_marked(text) or text)


def cluster_key(text: str) -> str:
    """Equal for answers that count as the same: by number where the answer is one, else by normalised text."""
    answer = final_answer(text)
    number = as_number(answer)
    return normalised(answer) if number is None else str(Context(prec=len(answer)).normalize(number))


def as_number(text: str) -> Decimal | None:
    """The number that a text is, with thousands separators, a currency sign or a percent sign; else None."""
    match = _EXACT.fullmatch(text.strip())
    return _decimal(match.group(1)) if match else None


def right(text: str, golds: Sequence[str]) -> bool:
    """Equal to an accepted answer after normalisation, or by number.

    A gold answer that is a number is also met by the first number of a marked answer (`The answer is 42 apples`), and by
    the last number of an unmarked one (`7 times 6 is 42`).
    """
    marked = _marked(text)
    answer = _stripped(marked or text)
    candidates = {normalised(text), normalised(answer)} - {""}
    numbers = _NUMBER.findall(answer)
    number = _decimal(numbers[0 if marked else -1]) if numbers else None
    for gold in golds:
        wanted = as_number(gold)
        if (number is not None and number == wanted) if wanted is not None else normalised(gold) in candidates:
            return True
    return False


def _marked(text: str) -> str:
    parts = (part.split("}", 1)[0].strip() for part in reversed(_MARKED.findall(text)))
    return next(filter(None, parts), "")


def _stripped(answer: str) -> str:
    return answer.strip().lstrip("*`").rstrip(".*` ")


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("−", "-"))
    except InvalidOperation:
        return None
