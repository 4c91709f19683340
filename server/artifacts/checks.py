"""The check of an upload, per kind: a received file -> its durable facts, or the error of the house that knows it.

The checks themselves are the same functions as on the command line; they are imported when a check is made, because
reading tensors may load more than the HTTP side wants.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from compressors.errors import DeltaError
from compressors.tokenizer import digest
from compressors.verify import Report
from server.artifacts.lifecycle import Check, Received
from server.artifacts.reserve import check_reserve
from server.artifacts.versions import (
    DeltaVersion,
    DirectionFacts,
    PolicyVersion,
    ProbeFacts,
    ProfileVersion,
    SAEVersion,
)
from steering.errors import PolicyError, SteeringError

Verify = Callable[[Path], Report]
Convert = Callable[[Path, Path], None]  # a PEFT folder, and the delta file to write. Blocking. Raises DeltaError


def delta_check(verify: Verify, base_stop_ids: tuple[int, ...] = (), reserved_tokens: int = 0) -> Check[DeltaVersion]:
    """`base_stop_ids`: the end tokens of the base's config.json; a delta keeps its own where they differ.

    The check raises ReserveExceeded for a delta that adds more than `reserved_tokens` to the vocabulary.
    """

    def check(incoming: Received) -> DeltaVersion:
        with path_untold(incoming.path):
            report = verify(incoming.path)
        check_reserve(report.added_tokens, reserved_tokens)
        manifest = report.manifest
        stop_ids = token_ids(manifest.tokenizer.eos_token_id)
        return DeltaVersion(
            digest=report.digest,
            nbytes=report.nbytes,
            created=int(time.time()),
            method=manifest.method,
            base_fingerprint=manifest.base_fingerprint,
            ratio=manifest.bytes_ratio or manifest.ratio,
            checks=report.checks,
            chat_template=manifest.tokenizer.chat_template or "",
            stop_ids=() if set(stop_ids) == set(base_stop_ids) else stop_ids,
            added_tokens=report.added_tokens,
            tokenizer=digest(manifest.tokenizer),
        )

    return check


def token_ids(eos_token_id: int | list[int] | None) -> tuple[int, ...]:
    """End tokens as a tuple; a config.json names one, several or none."""
    if eos_token_id is None:
        return ()
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)


@contextmanager
def path_untold(path: Path) -> Iterator[None]:
    """The checks are also commands, whose errors name the file; a client has sent none of that name."""
    try:
        yield
    except (DeltaError, SteeringError) as error:
        error.args = tuple(str(part).replace(str(path), "the file") for part in error.args)
        raise


@dataclass(frozen=True)
class Shape:
    """What of a base decides whether a profile or an SAE fits: rows of `d_in` values after each of `num_layers` layers."""

    fingerprint: str
    d_in: int
    num_layers: int


def profile_check(base: Shape) -> Check[ProfileVersion]:
    def check(incoming: Received) -> ProfileVersion:
        from steering.profile import check_profile

        with path_untold(incoming.path):
            header = check_profile(incoming.path, base.fingerprint, base.d_in, base.num_layers)
        probe = header.probe
        return ProfileVersion(
            digest=incoming.digest,
            nbytes=incoming.nbytes,
            created=int(time.time()),
            base_fingerprint=header.base_fingerprint,
            model_name=header.model_name,
            template_sha256=header.template_sha256,
            directions={
                name: DirectionFacts(layers=tuple(direction.layers), strength=direction.strength)
                for name, direction in header.directions.items()
            },
            latents={layer: facts.n_context + facts.n_parameter for layer, facts in header.layers.items()},
            probe=ProbeFacts(layer=probe.layer, threshold=probe.threshold, auroc=probe.auroc) if probe else None,
        )

    return check


def sae_check(base: Shape) -> Check[SAEVersion]:
    def check(incoming: Received) -> SAEVersion:
        from steering.formats import check_sae_file
        from steering.header import has_maxima

        with path_untold(incoming.path):
            header = check_sae_file(incoming.path, base.fingerprint, base.d_in, base.num_layers)
        return SAEVersion(
            digest=incoming.digest,
            nbytes=incoming.nbytes,
            created=int(time.time()),
            base_fingerprint=header.base_fingerprint,
            model_name=header.model_name,
            architecture=header.architecture,
            layer=header.hook_layer,
            d_in=header.d_in,
            d_sae=header.d_sae,
            has_maxima=has_maxima(incoming.path),
        )

    return check


def policy_check(base_fingerprint: str) -> Check[PolicyVersion]:
    """A policy may be for any delta and any template: it is used for requests that have both."""

    def check(incoming: Received) -> PolicyVersion:
        from steering.gate.policy import read_policy

        with path_untold(incoming.path):
            policy = read_policy(incoming.path)
        bound = policy.model
        if bound.base_fingerprint != base_fingerprint:
            message = f"the policy is for base {bound.base_fingerprint}, this server runs {base_fingerprint}"
            raise PolicyError(message)
        return PolicyVersion(
            digest=incoming.digest,
            nbytes=incoming.nbytes,
            created=int(time.time()),
            policy_id=policy.policy_id,
            model_name=bound.name,
            base_fingerprint=bound.base_fingerprint,
            delta_digest=bound.delta_digest,
            template_sha256=bound.template_sha256,
            stages=tuple(stage.name for stage in policy.stages),
            threshold=policy.thresholds.suppress,
            suppress_mode=policy.suppress_mode,
            placement=policy.placement,
            explore=policy.explore,
            hidden_profile=policy.probes.hidden_profile,
        )

    return check


def lora_conversion(base: Path) -> Convert:
    """LoRA folders that were trained on the base model in a folder -> delta files."""

    def convert(adapter: Path, out: Path) -> None:
        from compressors.peft import import_lora

        import_lora(adapter, base, out)

    return convert


@dataclass(frozen=True)
class Checks:
    """One check per kind, all against the same running base; `convert` makes a delta file of a PEFT folder."""

    delta: Check[DeltaVersion]
    profile: Check[ProfileVersion]
    sae: Check[SAEVersion]
    policy: Check[PolicyVersion]
    convert: Convert | None = None
