"""What a tool gate does to questions that were asked with it off, observing and enforcing: episodes to rows of a table.

`off` is the rival of every row. All modes ask the same questions greedily, so differences are of pairs: what observing adds
to a request is the median over questions, not the difference of two medians.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from server.bench.agent import Episode, Mode, Round
from server.bench.report import Measurement
from steering.gate.bounds import bootstrap_mean, mcnemar, upper_bound

DELTA = 0.05  # of the upper bounds: one-sided, at 95 %

Question = Mapping[Mode, Episode]


def by_question(episodes: Sequence[Episode]) -> list[Question]:
    """The questions that were asked in every mode."""
    found: dict[str, dict[Mode, Episode]] = {}
    for episode in episodes:
        found.setdefault(episode.task, {})[episode.mode] = episode
    return [one for one in found.values() if len(one) == 3]


def table(questions: Sequence[Question]) -> list[Measurement]:
    """Every row but those of requests without tools. `questions` must not be empty."""
    return [
        Measurement("questions", len(questions), ""),
        *_calls(questions),
        *_accuracy(questions),
        *_harm(questions),
        *_cost(questions),
        *_reasons(questions),
    ]


def _calls(questions: Sequence[Question]) -> list[Measurement]:
    off, enforce = (_mean([one[mode].calls for one in questions]) for mode in ("off", "enforce"))
    seconds = [_mean([one[mode].seconds for one in questions]) for mode in ("off", "enforce")]
    rival = "tool calls a question, off"
    return [
        Measurement(rival, off, ""),
        Measurement("tool calls a question, enforce", enforce, "", _ratio(enforce, off), rival),
        Measurement("time to the answer, off", seconds[0], "s"),
        Measurement(
            "time to the answer, enforce", seconds[1], "s", _ratio(seconds[1], seconds[0]), "time to the answer, off"
        ),
    ]


def _accuracy(questions: Sequence[Question]) -> list[Measurement]:
    off, observe, enforce = (
        np.array([one[mode].right for one in questions], dtype=np.float64) for mode in ("off", "observe", "enforce")
    )
    change = enforce - off
    low, high = bootstrap_mean(change, np.ones(len(change)))
    return [
        Measurement("accuracy, off", 100 * off.mean(), "%"),
        Measurement("accuracy, observe", 100 * observe.mean(), "%"),
        Measurement("accuracy, enforce", 100 * enforce.mean(), "%"),
        Measurement("accuracy, enforce - off", 100 * change.mean(), "points"),
        Measurement("  95 % interval, low", 100 * low, "points"),
        Measurement("  95 % interval, high", 100 * high, "points"),
        Measurement("  McNemar's p", mcnemar(int((change < 0).sum()), int((change > 0).sum())), ""),
    ]


def _harm(questions: Sequence[Question]) -> list[Measurement]:
    """Harm: changed by the gate, right with it off and wrong with it enforcing. Rescue: the other way round."""
    n = len(questions)
    acted = [one for one in questions if one["enforce"].acted]
    harm = sum(one["off"].right and not one["enforce"].right for one in acted)
    rescue = sum(one["enforce"].right and not one["off"].right for one in acted)
    flipped = sum(one["enforce"].right != one["off"].right for one in questions) - harm - rescue
    rows = [
        Measurement("questions that the gate changed", len(acted), "", len(acted) / n, "questions"),
        Measurement("harm", harm, "", harm / n, "questions"),
        Measurement("  Clopper-Pearson bound, 95 %", 100 * upper_bound(harm, n, DELTA), "%"),
        Measurement("rescue", rescue, "", rescue / n, "questions"),
        Measurement("  Clopper-Pearson bound, 95 %", 100 * upper_bound(rescue, n, DELTA), "%"),
        Measurement("right otherwise though not changed", flipped, ""),
    ]
    leaks = sum(any(one.leak for one in question["enforce"].rounds) for question in questions)
    return [*rows, Measurement("leaks", leaks, "", leaks / n, "questions")]


def _cost(questions: Sequence[Question]) -> list[Measurement]:
    """Of first requests that the gate looked at and allowed: later ones are in a tool loop, where it asks nothing."""
    pairs = [(one["off"].rounds[0], one["observe"].rounds[0]) for one in questions]
    allowed = [(off, seen) for off, seen in pairs if seen.decision == "allow"]
    rows = [Measurement("first requests allowed", len(allowed), "", len(allowed) / len(questions), "questions")]
    if not allowed:
        return rows
    off_s = statistics.median(off.seconds for off, _ in allowed)
    added_s = statistics.median(seen.seconds - off.seconds for off, seen in allowed)
    rival, generated = "  p50 of the request, off", sum(seen.completion_tokens for _, seen in allowed)
    probed = sum(seen.probe_completion_tokens for _, seen in allowed)
    gate_ms = statistics.median(seen.gate_ms for _, seen in allowed)
    return [
        *rows,
        Measurement(rival, 1000 * off_s, "ms"),
        Measurement("  p50 that observing adds", 1000 * added_s, "ms", _ratio(added_s, off_s), rival.strip()),
        Measurement("  p50 that the gate says it took", gate_ms, "ms", _ratio(gate_ms, 1000 * off_s), rival.strip()),
        Measurement("  tokens generated", generated, "tok"),
        Measurement("  tokens of probes", probed, "tok", _ratio(probed, generated), "tokens generated"),
        Measurement("  prompt tokens of probes", sum(seen.probe_prompt_tokens for _, seen in allowed), "tok"),
    ]


def _reasons(questions: Sequence[Question]) -> list[Measurement]:
    """First requests while enforcing, the commonest first; then what the gate did later in the loops."""
    first: Counter[str] = Counter(_told(one["enforce"].rounds[0]) for one in questions)
    later: Counter[str] = Counter(_told(told) for one in questions for told in one["enforce"].rounds[1:])
    rows = [Measurement(f"first: {told}", count, "") for told, count in first.most_common()]
    return rows + [Measurement(f"in loops: {told}", count, "") for told, count in later.most_common()]


def _told(one: Round) -> str:
    return f"{one.decision}, {one.reason}" if one.decision else "not told"


def plain_rows(with_gate_s: Sequence[float], without_s: Sequence[float]) -> list[Measurement]:
    """Requests without tools: at a gateway that has the policy and enforces, and at one that has none."""
    gated, bare = statistics.median(with_gate_s), statistics.median(without_s)
    rival = "without tools: p50, no gate"
    return [
        Measurement(rival, 1000 * bare, "ms"),
        Measurement("without tools: p50, gate enforcing", 1000 * gated, "ms", _ratio(gated, bare), rival),
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ratio(value: float, rival: float) -> float | None:
    return value / rival if rival else None
