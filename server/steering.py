"""`steering` and `conflict` of a request -> one edit for the engine, its names resolved to digests once.

The edit's spec is canonical JSON; its fingerprint is the SHA-256 of the same JSON without the artifacts' local paths.
What has no effect (strength 0, no features) becomes no edit at all: the request is then the plain one.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from server.artifacts.names import BaseMismatch, KindError, NameNotFound, Registry
from server.artifacts.pool import PlannedEdit
from server.artifacts.versions import ProbeFacts, ProfileVersion, SAEVersion
from server.core import (
    ChatPrompt,
    ConflictCheck,
    FeatureSteering,
    GatewayError,
    GenerationRequest,
    GenerationSteps,
    InvalidRequest,
    ProfileSteering,
    PromptPositions,
    Window,
)
from server.decisions import Decisions, Steered, SteeringMode, Warning
from server.engine.base import EngineEdit
from server.latent_values import plain_values
from server.wire import MissingParameter

Json = dict[str, Any]


class DefaultUnavailable(GatewayError):
    """The steering that the operator has set for all requests cannot be used, whatever the request says of itself."""


@dataclass(frozen=True)
class Tables:
    """The resolved half of a request's edit; `idle` says why it would change nothing."""

    tables: tuple[Json, ...]
    artifacts: frozenset[str]
    features: int
    first_layer: int
    prompt: PromptPositions = "last"
    generation: GenerationSteps = None
    idle: str | None = None


@dataclass(frozen=True)
class Probe:
    facts: ProbeFacts
    digest: str


@dataclass(frozen=True)
class Plan:
    """What the engine is asked to do, and what its report is held against. `edit` None: nothing.

    `best_effort`: where the edit cannot be made, the request is answered plainly.
    """

    edit: PlannedEdit | None = None
    edits_rows: bool = False  # False: the edit only scores
    prompt: PromptPositions = None
    generation: GenerationSteps = None
    at_least: float | None = None  # the score from which on a policy's edit is applied
    best_effort: bool = False


def edited_positions(prompt: PromptPositions, length: int) -> Sequence[int]:
    """The absolute positions that are edited of a prompt of `length` tokens. Raises InvalidRequest."""
    if prompt is None:
        return ()
    if prompt == "last":
        return (length - 1,)
    if prompt == "all":
        return range(length)
    if isinstance(prompt, Window):
        found: Sequence[int] = range(length)[prompt.start : prompt.end]
        if not found:
            _outside(f"the window is empty in a prompt of {length} tokens")
        return found
    for position in prompt:
        if not -length <= position < length:
            _outside(f"position {position} is outside the prompt of {length} tokens")
    return sorted({position % length for position in prompt})


def _outside(message: str) -> NoReturn:
    raise InvalidRequest(message, param="steering.edits.0.apply.prompt")


@dataclass(frozen=True)
class Planner:
    """Resolves names to digests and checks what only the artifacts can tell.

    `default` steers every request that brings neither `steering` nor a policy, unless it opts out where that is allowed.
    """

    profiles: Registry[ProfileVersion]
    saes: Registry[SAEVersion]
    base_fingerprint: str
    template_sha256: str
    max_strength: float
    default: ProfileSteering | None = None
    allow_opt_out: bool = True

    def plan(self, request: GenerationRequest, decisions: Decisions) -> Plan:
        """Fills `decisions.steered` in.

        Raises InvalidRequest, MissingParameter, NameNotFound, BaseMismatch, DefaultUnavailable.
        """
        conflict, options = request.conflict, request.options
        chosen, mode = self._chosen(request)
        scored = conflict is not None and (conflict.score or conflict.then is not None)
        if chosen is None and not scored:
            return Plan()
        steered = decisions.steered = Steered(mode, compare=options.compare, report=options.report)
        tables = self._tables(chosen, steered) if chosen is not None else None
        probe = self._probe(conflict, chosen) if conflict is not None and scored else None
        if tables is not None and probe is not None:
            _check_order(probe, tables, mode)
        path = self.profiles.path(probe.digest) if probe else ""
        edit = planned_edit(tables, probe, path, conflict.at_least if conflict else None)
        steered.outcome = "failed"  # until the engine's report says better
        if probe is not None:
            steered.probe_layer, steered.probe_auroc = probe.facts.layer, probe.facts.auroc
        if tables is not None and tables.idle:
            steered.outcome, steered.reason = "no_op", tables.idle
            return Plan(edit)
        if edit is not None:
            decisions.warnings += self._template_warnings(request, chosen, conflict)
            steered.fingerprint = edit.edit.fingerprint
        if tables is None:
            return Plan(edit)
        steered.features = tables.features
        at_least = conflict.at_least if conflict else None
        return Plan(edit, True, tables.prompt, tables.generation, at_least, options.best_effort)

    def _chosen(self, request: GenerationRequest) -> tuple[ProfileSteering | FeatureSteering | None, SteeringMode]:
        """What steers the request: its policy, its own steering, or the default. Raises InvalidRequest."""
        if request.conflict is not None and request.conflict.then is not None:
            return request.conflict.then, "policy"
        if request.steering is not None:
            return request.steering, "profile" if isinstance(request.steering, ProfileSteering) else "features"
        if self.default is None or (request.opt_out and self.allow_opt_out):
            return None, "score"
        if request.opt_out:
            message = "this server steers every request: leave steering out or give another one, but not null"
            raise InvalidRequest(message, param="steering")
        return self.default, "default"

    def _tables(self, chosen: ProfileSteering | FeatureSteering, steered: Steered) -> Tables:
        if isinstance(chosen, FeatureSteering):
            return self._of_features(chosen)
        if steered.mode != "default":
            return self._of_profile(chosen, steered)
        try:
            return self._of_profile(chosen, steered)
        except (InvalidRequest, KindError) as error:
            steered.outcome = "failed"
            without = '; "steering": null does without it' if self.allow_opt_out else ""
            raise DefaultUnavailable(f"this server's default steering cannot be used: {error}{without}") from error

    def probe_edit(self, digest: str, param: str) -> PlannedEdit:
        """The edit that only reads the probe of the profile of that digest.

        Raises NameNotFound, BaseMismatch, InvalidRequest.
        """
        version = self.profiles.version(digest)
        if version is None:
            raise NameNotFound("profile", "there is no profile of that digest", param=param)
        edit = planned_edit(None, self._probe_of(version, param), self.profiles.path(digest))
        assert edit is not None  # it reads
        return edit

    def _of_profile(self, wanted: ProfileSteering, steered: Steered) -> Tables:
        version = self._profile(wanted.profile, f"{wanted.field}.profile")
        direction = version.directions.get(wanted.direction)
        if direction is None:
            known = ", ".join(sorted(version.directions)) or "none, only a probe"
            raise InvalidRequest(
                f"the profile has no such direction; it has: {known}", param=f"{wanted.field}.direction"
            )
        strength = direction.strength if wanted.strength is None else wanted.strength
        if strength > self.max_strength:
            message = f"the strength {strength:g} is over this server's limit of {self.max_strength:g}"
            raise InvalidRequest(message, param=f"{wanted.field}.strength")
        layers = wanted.layers or direction.layers
        if extra := set(layers) - set(direction.layers):
            message = f"layer {min(extra)} is none of the direction's layers {sorted(direction.layers)}"
            raise InvalidRequest(message, param=f"{wanted.field}.layers")
        steered.profile, steered.profile_digest = wanted.profile, version.digest
        steered.direction, steered.strength = wanted.direction, strength
        some = None if set(layers) == set(direction.layers) else sorted(layers)
        artifact = self._artifact(self.profiles, version.digest)
        table = profile_table(artifact, wanted.direction, strength, wanted.mode, some)
        return Tables(
            tables=(table,),
            artifacts=frozenset({version.digest}),
            features=sum(version.latents[layer] for layer in layers),
            first_layer=min(layers),
            idle="the strength is 0" if strength == 0 else None,
        )

    def _of_features(self, wanted: FeatureSteering) -> Tables:
        found: dict[str, tuple[SAEVersion, dict[int, Json]]] = {}
        for index, edit in enumerate(wanted.edits):
            at = f"steering.edits.{index}"
            version = self.saes.active(edit.sae, f"{at}.sae")
            if version.base_fingerprint not in (None, self.base_fingerprint):
                raise BaseMismatch("sae", "the SAE was made for another base model", param=f"{at}.sae")
            _, features = found.setdefault(version.digest, (version, {}))
            for number, feature in enumerate(edit.features):
                param = f"{at}.features.{number}.id"
                if feature.id >= version.d_sae:
                    raise InvalidRequest(f"the SAE has the features 0 to {version.d_sae - 1}", param=param)
                if feature.id in features:
                    raise InvalidRequest(f"feature {feature.id} of that SAE is edited twice", param=param)
                features[feature.id] = {"id": feature.id, "op": feature.op}
            values = plain_values(edit, version, Path(self.saes.path(version.digest)), at)
            for feature, value in zip(edit.features, values, strict=True):
                features[feature.id]["value"] = value
        used = sorted((version.layer, digest) for digest, (version, features) in found.items() if features)
        tables = [
            {
                "sae": self._artifact(self.saes, digest),
                "layer": layer,
                "features": [features for _, features in sorted(found[digest][1].items())],
            }
            for layer, digest in used
        ]
        idle = None if used else "no features are edited"
        if wanted.prompt is None and wanted.generation is None:
            idle = "no positions are edited"
        return Tables(
            tables=tuple(tables),
            artifacts=frozenset(digest for _, digest in used),
            features=sum(len(features) for _, features in found.values()),
            first_layer=min((layer for layer, _ in used), default=0),
            prompt=wanted.prompt,
            generation=wanted.generation,
            idle=idle,
        )

    def _probe(self, conflict: ConflictCheck, chosen: ProfileSteering | FeatureSteering | None) -> Probe:
        """The probe of the profile that the check names, or else of the one that steers."""
        if conflict.profile is not None:
            name, param = conflict.profile, "conflict.profile"
        elif isinstance(chosen, ProfileSteering):
            name, param = chosen.profile, f"{chosen.field}.profile"
        else:
            raise MissingParameter("name the profile whose probe scores the conflict", param="conflict.profile")
        return self._probe_of(self._profile(name, param), param)

    def _probe_of(self, version: ProfileVersion, param: str) -> Probe:
        self._check_base(version, param)
        if version.probe is None:
            raise InvalidRequest("the profile has no conflict probe", param=param)
        return Probe(version.probe, version.digest)

    def _profile(self, name: str, param: str) -> ProfileVersion:
        version = self.profiles.active(name, param)
        self._check_base(version, param)
        return version

    def _check_base(self, version: ProfileVersion, param: str) -> None:
        if version.base_fingerprint != self.base_fingerprint:
            raise BaseMismatch("profile", "the profile was made for another base model", param=param)

    def _template_warnings(
        self,
        request: GenerationRequest,
        chosen: ProfileSteering | FeatureSteering | None,
        conflict: ConflictCheck | None,
    ) -> list[Warning]:
        """Latents and probes hold for the text around the question that they were fitted behind.

        A prompt of plain text may hold a template that the client applied itself.
        """
        chat = isinstance(request.prompts[0], ChatPrompt)
        right = {self.template_sha256} if chat else {self.template_sha256, ""}
        names = [chosen.profile] if isinstance(chosen, ProfileSteering) else []
        if conflict is not None and conflict.profile is not None:
            names.append(conflict.profile)
        return [
            Warning("template_mismatch", f"the profile {name!r} was fitted on another chat template than this prompt's")
            for name in dict.fromkeys(names)
            if self.profiles.active(name, "steering.profile").template_sha256 not in right
        ]

    def _artifact(self, registry: Registry[Any], digest: str) -> Json:
        return {"path": registry.path(digest), "digest": digest}


def _check_order(probe: Probe, tables: Tables, mode: SteeringMode) -> None:
    """A score is that of the unedited prompt; the layer that a probe reads may be edited, for it is read first.

    The worker refuses the same (worker/resident.py), where it would be the server's failure.
    """
    reads, edited = probe.facts.layer, tables.first_layer
    if tables.idle:
        return
    if mode == "policy" and reads >= edited:
        message = (
            f"the probe reads layer {reads} and the edit begins at layer {edited}: "
            "a policy needs a probe below the first edited layer"
        )
        raise InvalidRequest(message, param="conflict.policy.then")
    if reads > edited:
        message = (
            f"the probe reads layer {reads}, behind the first edited layer {edited}, and the score is that of the unedited "
            f'prompt: ask for it with "steering": null, edit only layers from {reads} on, or name in conflict.profile one '
            f"whose probe reads a layer up to {edited}"
        )
        raise InvalidRequest(message, param="conflict")


def profile_table(
    artifact: Json, direction: str, strength: float, mode: str = "targets", layers: list[int] | None = None
) -> Json:
    """A profile's part of a spec; `layers` None are all of the direction's."""
    return {
        "profile": artifact,
        "direction": direction,
        "strength": float(strength),
        "mode": mode,
        "layers": layers,
    }


def planned_edit(
    tables: Tables | None, probe: Probe | None = None, probe_path: str = "", at_least: float | None = None
) -> PlannedEdit | None:
    """The edit of tables and probe together; None where neither does anything."""
    active = None if tables is None or tables.idle else tables
    if active is None and probe is None:
        return None
    spec: Json = {
        "tables": list(active.tables) if active else [],
        "prompt": _positions(active.prompt) if active else None,
        "generation": _positions(active.generation) if active else None,
        "probe": {"path": probe_path, "digest": probe.digest} if probe else None,
        "condition": {"at_least": at_least} if active and at_least is not None else None,
    }
    fingerprint = hashlib.sha256(_canonical(_without_paths(spec)).encode()).hexdigest()
    artifacts = (active.artifacts if active else frozenset()) | ({probe.digest} if probe else frozenset())
    return PlannedEdit(EngineEdit(fingerprint, _canonical(spec)), artifacts)


def _positions(found: PromptPositions | GenerationSteps) -> object:
    if isinstance(found, Window):
        return {"window": [found.start, found.end]}
    return {"positions": list(found)} if isinstance(found, tuple) else found


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items() if key != "path"}
    return [_without_paths(inner) for inner in value] if isinstance(value, list) else value
