"""`deltaworks gate fit`."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from steering.gate.policy import Mixed, Placement, SuppressMode
from steering.gate.signals import STAGES
from steering.options import numbers, reporting, words

if TYPE_CHECKING:
    from steering.gate.fit import FitSettings, Identity
    from steering.gate.labels import Labels

_EXAMPLE = """example:
  deltaworks gate fit labels.jsonl -o policy.json --epsilon 0.02 --delta 0.1"""


def add_parser(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "fit",
        help="calibrate a policy on labelled questions, with a bound on the harm that it does",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("labels", metavar="LABELS", type=Path, help="rows of `deltaworks gate label`")
    parser.add_argument("-o", "--out", type=Path, required=True, help="policy to write (.json)")
    parser.add_argument("--epsilon", type=_share, default=0.02, help="largest harm (default: %(default)g)")
    parser.add_argument(
        "--delta", type=_share, default=0.1, help="probability that the bound is wrong (default: %(default)g)"
    )
    parser.add_argument(
        "--r",
        type=_share,
        default=0.75,
        help="known: this share of answers is right without tools (default: %(default)g)",
    )
    parser.add_argument("--stages", type=_stages, help=f"of {', '.join(STAGES)} (default: all that every row has)")
    parser.add_argument(
        "--band",
        type=_band,
        default=(0.1, 0.9),
        metavar="LO,HI",
        help="a score outside decides, later stages are not asked (default: 0.1,0.9)",
    )
    parser.add_argument("--split", type=numbers, default=(0.4, 0.25, 0.35), help="shares (default: 0.4,0.25,0.35)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    parser.add_argument("--l2", type=float, default=1.0, help="of the logistic models (default: %(default)g)")
    parser.add_argument("--max-probe-tokens", type=int, help="per request (default: enough for every probe)")
    parser.add_argument("--timeout-ms", type=int, default=2000, help="of all probes together (default: %(default)s)")
    parser.add_argument("--suppress-mode", choices=get_args(SuppressMode), default="drop_tools")
    parser.add_argument(
        "--mixed",
        choices=get_args(Mixed),
        default="narrow",
        help="requests with tools of other kinds too: drop the gateable ones, or let no score act on them (default: %(default)s)",
    )
    parser.add_argument("--placement", choices=get_args(Placement), default="pre")
    parser.add_argument("--explore", type=float, default=0.0, help="share of decisions not carried out (default: 0)")
    parser.add_argument(
        "--hidden-profile", type=_sha256, metavar="SHA256", help="steering profile whose probe the stage hidden reads"
    )
    parser.add_argument(
        "--streams",
        type=Path,
        help="of `deltaworks gate streams`: fit the probe of hidden to them, on the rows to fit on",
    )
    parser.add_argument("--probe-out", type=Path, help="profile to write it to (.safetensors)")
    parser.add_argument("--require", type=_share, help="score below which callers who opt in have a call required")
    parser.add_argument(
        "--budget-quantile",
        type=_share,
        metavar="Q",
        help="budget per kind: this quantile of the calls that were needed",
    )
    for name in ("base-fingerprint", "delta-digest", "template-sha256"):
        parser.add_argument(f"--{name}", help="of the model, where the labels do not say it")
    parser.set_defaults(run=reporting(_run))


def _run(args: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from steering.errors import FitError
    from steering.gate.fit import FitSettings, Identity, fit
    from steering.gate.labels import read_labels
    from steering.gate.policy import write_policy
    from steering.gate.schema import reason
    from steering.gate.tables import fitted_lines

    settings = FitSettings(
        r=args.r,
        epsilon=args.epsilon,
        delta=args.delta,
        seed=args.seed,
        shares=args.split,
        l2=args.l2,
        band=args.band,
        stages=args.stages,
        max_probe_tokens=args.max_probe_tokens,
        timeout_ms=args.timeout_ms,
        suppress_mode=args.suppress_mode,
        mixed=args.mixed,
        placement=args.placement,
        explore=args.explore,
        hidden_profile=args.hidden_profile,
        require=args.require,
        budget_quantile=args.budget_quantile,
    )
    identity = Identity(args.base_fingerprint, args.delta_digest, args.template_sha256)
    labels = read_labels(args.labels)
    if (args.streams is None) != (args.probe_out is None):
        raise FitError(
            "--streams and --probe-out belong together: what the probe is fitted to, and where it is written"
        )
    if args.streams is not None:
        if args.hidden_profile is not None:
            raise FitError("--hidden-profile names a probe that is there; --streams fits a new one")
        labels, settings = _with_probe(labels, settings, identity, args.streams, args.probe_out)
    try:
        fitted = fit(labels, settings, identity)
    except (
        ValidationError
    ) as error:  # settings that a policy cannot have, such as a draft as the answer without a draft
        raise FitError(f"these settings make no policy: {reason(error)}") from error
    write_policy(fitted.policy, args.out)
    print("\n".join(fitted_lines(fitted)))
    for warning in fitted.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"wrote {args.out}  policy {fitted.policy.policy_id}")
    return 0


def _with_probe(
    labels: Labels, settings: FitSettings, identity: Identity, streams: Path, out: Path
) -> tuple[Labels, FitSettings]:
    """The labels with the scores of a probe that is fitted and written now, and the settings that name it."""
    from steering.gate.fit import binding, parted
    from steering.gate.knows import fit_knows, open_streams, with_scores, write_knows
    from steering.header import file_sha256

    rows, splits = parted(labels, settings)
    knows = fit_knows(rows, splits.fit, open_streams(streams), settings.r, settings.seed)
    write_knows(knows, binding(rows, identity), out)
    print(
        f"probe: layer {knows.header.layer}, AUROC {knows.header.auroc:.3f} out of fold on {knows.header.n} rows; "
        f"wrote {out}, which the server needs as a profile"
    )
    scored = replace(labels, rows=with_scores(labels.rows, knows))
    return scored, replace(settings, hidden_profile=file_sha256(out))


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no SHA-256 in lower case")
    return text


def _band(text: str) -> tuple[float, ...]:
    found = numbers(text)
    if len(found) != 2 or not 0 <= found[0] <= found[1] <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not LO,HI with 0 <= LO <= HI <= 1")
    return found


def _stages(text: str) -> tuple[str, ...]:
    found = words(text)
    unknown = [name for name in found if name not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(STAGES)}")
    return found
