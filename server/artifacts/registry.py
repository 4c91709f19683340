"""The names that a request can mean: deltas, which share one flat namespace with the base, and their combinations."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from server.artifacts.backing import StoreError
from server.artifacts.combination import combination
from server.artifacts.names import BaseMismatch, Known, Registry
from server.artifacts.reserve import check_reserve
from server.artifacts.shelf import Shelf
from server.artifacts.versions import DeltaVersion, Ref
from server.core import DeltaPart, GatewayError, InvalidRequest
from server.engine.base import EngineDelta, WeightedDelta

DELTA, PROFILE, SAE, POLICY = "delta", "profile", "sae", "policy"
COMBINED = "combined"
MayUse = Callable[[str], bool]  # whether the caller may use a delta of that name
_METRIC_LABELS = ("base", "none", "other", COMBINED)  # what stands for no registered delta in the metrics


class ModelNotFound(GatewayError):
    """No base and no delta is called that; the message lists no other names."""


@dataclass(frozen=True)
class Resolved:
    """What a request means: the base (`delta` None), a delta at one digest, or a combination of `parts`, at theirs.

    NAME@`version` means the same, whatever happens to the name.
    """

    name: str
    delta: EngineDelta | None
    parts: tuple[DeltaPart, ...] = ()
    version: str | None = None


class DeltaRegistry(Registry[DeltaVersion]):
    """Deltas share one flat namespace with the base: both are what a request calls `model`.

    `reserved_tokens`: how many tokens a delta may add to the vocabulary, which was another number when it was uploaded, perhaps.
    """

    def __init__(self, shelf: Shelf, base_id: str, base_fingerprint: str, reserved_tokens: int = 0) -> None:
        super().__init__(shelf, DELTA, Ref[DeltaVersion], (base_id, *_METRIC_LABELS), eager=False)
        self.base_id = base_id
        self._base_fingerprint = base_fingerprint
        self._reserved_tokens = reserved_tokens
        self._foreign: set[str] = set()  # digests of deltas that were checked against another base

    def adopt(self, name: str, known: Known[DeltaVersion] | None) -> None:
        super().adopt(name, known)
        for version in known.ref.versions if known else ():
            if version.base_fingerprint != self._base_fingerprint:
                self._foreign.add(version.digest)

    def check(self, objects: Collection[str]) -> None:
        super().check(objects)
        if self.base_id in self._known:
            raise StoreError(f"the base is called {self.base_id!r} like a stored delta; set server.served_name")

    def resolve(self, model: str, may_use: MayUse) -> Resolved:
        """`model` is the base's id, or names a delta as `lookup` reads it. Raises ModelNotFound, ReserveExceeded."""
        return Resolved(self.base_id, None) if model == self.base_id else self._delta(model, "model", may_use)

    def lookup(self, model: str, param: str, may_use: MayUse) -> tuple[Ref[DeltaVersion], DeltaVersion]:
        """The name and version that NAME, BASE:NAME, NAME@VERSION or BASE:NAME@VERSION means; the first that there is.

        A delta that may not be used is as one that is not there. Raises ModelNotFound.
        """
        name = model.removeprefix(f"{self.base_id}:")
        start, _, wanted = name.rpartition("@")
        for ref, version in (
            (self.find(model), None),
            (self.find(name), None),
            (self.find(start), wanted),
        ):
            if ref is not None and may_use(ref.name):
                found = ref.active() if version is None else ref.at(version)
                if found is not None:
                    return ref, found
        raise ModelNotFound("the model does not exist, or you have no access to it", param=param)

    def combine(self, model: str, parts: Sequence[DeltaPart], chat: bool, may_use: MayUse) -> Resolved:
        """The weighted sum of named deltas; one alone that counts once is that delta. `chat`: its template will be used.

        Raises ModelNotFound, InvalidRequest, ReserveExceeded.
        """
        if self.resolve(model, may_use).delta is not None:
            message = f"model names a delta, and so does delta; beside delta, model is the base, {self.base_id!r}"
            raise InvalidRequest(message, param="model")
        deltas: list[WeightedDelta] = []
        for i, part in enumerate(parts):
            one = self._delta(part.name, f"delta.{i}.name", may_use)
            assert one.delta is not None  # `_delta` finds no base
            if any(one.delta == other.delta for other in deltas):
                raise InvalidRequest("two names of one and the same delta; add up its weights", param=f"delta.{i}.name")
            if len(parts) == 1 and part.weight == 1:
                return one
            deltas.append(WeightedDelta(one.delta, part.weight))
        named = tuple(replace(part, digest=found.delta.digest) for part, found in zip(parts, deltas, strict=True))
        return Resolved(COMBINED, combination(deltas, chat), named)

    def _delta(self, model: str, param: str, may_use: MayUse) -> Resolved:
        """Raises ModelNotFound, ReserveExceeded."""
        ref, version = self.lookup(model, param, may_use)
        check_reserve(version.added_tokens, self._reserved_tokens)
        delta = replace(
            self.engine_delta(version.digest),
            chat_template=version.chat_template,
            stop_ids=version.stop_ids,
            added_tokens=version.added_tokens,
            tokenizer=version.tokenizer,
        )
        return Resolved(ref.name, delta, version=ref.label(version.digest))

    async def set_pinned(self, name: str, pinned: bool) -> Ref[DeltaVersion]:
        """Raises NameNotFound, ArtifactBusy."""

        def pin(old: Ref[DeltaVersion] | None) -> Ref[DeltaVersion]:
            return self._existing(old).model_copy(update={"pinned": pinned})

        return self._existing(await self._change(name, pin))

    def pinned(self) -> list[EngineDelta]:
        """What the pinned names point to."""
        digests = {ref.digest for ref in self.refs() if ref.pinned and ref.digest is not None} - self._foreign
        return [self.engine_delta(digest) for digest in sorted(digests)]

    def engine_delta(self, digest: str) -> EngineDelta:
        """Raises BaseMismatch."""
        if digest in self._foreign:
            raise BaseMismatch(DELTA, "the delta was made for another base model", param="model")
        return EngineDelta(digest, self.path(digest))
