"""Fits and effects as lines of text."""

from __future__ import annotations

from collections.abc import Mapping

from steering.gate.effects import Effects, Outcome, Quality, Rate
from steering.gate.fit import Fitted


def fitted_lines(fitted: Fitted) -> list[str]:
    lines = [
        "{} rows to fit, {} to calibrate, {} to choose the threshold and for the numbers below".format(*fitted.rows)
    ]
    lines += quality_lines(fitted.quality)
    settings = fitted.policy.eval
    if fitted.point is not None and settings is not None:
        lines.append(
            f"threshold {fitted.point.tau:.2f}: harm at most {fitted.point.harm_ucb:.4f} with confidence "
            f"{1 - settings.delta:g} (epsilon {settings.epsilon:g})"
        )
    else:
        lines.append("threshold: none, the gate never suppresses")
    return lines + effects_lines(fitted.effects)


def quality_lines(found: Mapping[str, Quality | None]) -> list[str]:
    """ECE in ten bins of equal mass, and of equal width."""
    lines = [f"{'stage':10}{'rows':>7}{'AUROC':>8}{'ECE mass':>10}{'ECE width':>11}{'Brier':>8}"]
    for name, one in found.items():
        if one is None:
            lines.append(f"{name:10}{0:7}")
        else:
            area = "-" if one.auroc is None else f"{one.auroc:.3f}"
            lines.append(f"{name:10}{one.n:7}{area:>8}{one.ece_mass:10.3f}{one.ece_width:11.3f}{one.brier:8.3f}")
    return lines


def effects_lines(found: Effects) -> list[str]:
    lines = [f"{found.n} questions, alpha (known) {_rate(found.alpha)}", f"{'':22}{'before':>26}{'after':>26}"]
    rows = zip(_rates(found.before).items(), _rates(found.after).values(), strict=True)
    lines += [f"{label:22}{_rate(before):>26}{_rate(after):>26}" for (label, before), after in rows]
    lines.append(f"{'calls per question':22}{found.before.calls:>26.2f}{found.after.calls:>26.2f}")
    lines.append(f"suppressed {_rate(found.suppressed)}, of these right without tools {_rate(found.precision)}")
    bound = "" if found.harm_ucb is None else f", bound {found.harm_ucb:.4f}"
    lines.append(f"harm (rescue lost) {_rate(found.harm)}{bound}; tool harm spared {_rate(found.spared)}")
    low, high = found.accuracy_change.interval
    lines.append(
        f"accuracy {found.accuracy_change.value:+.3f} [{low:+.3f}, {high:+.3f}], McNemar p {found.mcnemar_p:.3g}; "
        f"{found.probe_tokens:.1f} probe tokens per question"
    )
    if found.unasked:
        lines.append(f"{found.unasked} rows lack a signal that the policy asks for, and are left as they are")
    return lines


def _rates(outcome: Outcome) -> dict[str, Rate | None]:
    return {
        "call rate": outcome.call_rate,
        "beta (calls if known)": outcome.beta,
        "overuse alpha*beta": outcome.overuse,
        "underuse": outcome.underuse,
        "accuracy": outcome.accuracy,
        "tools spoil": outcome.tool_harm,
        "tools save": outcome.tool_rescue,
    }


def _rate(rate: Rate | None) -> str:
    return "-" if rate is None else f"{rate.value:.3f} [{rate.interval[0]:.3f}, {rate.interval[1]:.3f}]"
