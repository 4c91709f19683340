"""How high a score can still get while a draft is being written: where it cannot reach the threshold, the rest is wasted.

The first tokens leave a range to every feature of the whole draft: the least probability only falls, the largest entropy only
rises, words of refusal stay. A score is monotone in each feature, so the best ends of the ranges give one that no continuation
exceeds. A stopped draft therefore decides as the whole one would have; and its own features lie in the ranges, so the score that
is told of it lies on the same side of the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from steering.gate.cascade import Cascade, Walk, score_of
from steering.gate.policy import Stage
from steering.gate.signals import Draft, refused_for_good


def settled(cascade: Cascade, walk: Walk, draft: Draft) -> bool:
    """Whether a draft that begins so ends the cascade without suppressing, whatever follows."""
    if walk.pending != ("draft",) or not draft.logprobs:
        return False
    stage = cascade.stages[walk.index]
    last = walk.index + 1 == len(cascade.stages)
    bound = cascade.tau if last else min(stage.lo, cascade.tau)
    return ceiling(stage, walk.features, draft, cascade.settings.max_tokens) < bound


def ceiling(stage: Stage, known: Mapping[str, float], draft: Draft, max_tokens: int) -> float:
    """The highest score of a stage after any draft of at most `max_tokens` tokens that begins so; `known`: the other features.

    Raises KeyError for a feature that is missing.
    """
    ranges, best = _ranges(draft, max_tokens), dict(known)
    for feature, weight in zip(stage.features, stage.logistic.weights, strict=True):
        if feature.name in ranges:
            lowest, highest = ranges[feature.name]
            # One without weight is worth the same everywhere; an endless range times 0 is no number.
            best[feature.name] = highest if weight > 0 else lowest if weight < 0 else feature.mean
    return score_of(stage, best)


def _ranges(draft: Draft, max_tokens: int) -> dict[str, tuple[float, float]]:
    """(lowest, highest) of every feature of the whole draft."""
    first, count = draft.features(), len(draft.logprobs)
    most = max(max_tokens, count)
    return {
        "draft.mean_logprob": (-math.inf, sum(draft.logprobs) / most),
        "draft.min_prob": (0.0, first["draft.min_prob"]),
        "draft.max_entropy": (first["draft.max_entropy"], math.inf),
        "draft.tokens": (math.log1p(count), math.log1p(most)),
        "draft.refusal": (float(refused_for_good(draft.text)), 1.0),
        "draft.finished": (0.0, 1.0),
    }
