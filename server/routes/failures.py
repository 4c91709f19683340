"""Which errors a route answers with, beside 500 internal_error: what the API's document says of them.

Every test of the HTTP side holds its answers against it (tests/server/contract.py).
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from starlette.exceptions import HTTPException

from compressors import errors as delta_errors
from server import admission, auth, core, deadline, gateway, prompt, proof, supervisor, wire
from server import steering as plans
from server.artifacts import adapters as folder
from server.artifacts import archive, backing, delta_pool, lifecycle, names, pool, registry, reserve, store
from server.engine import base as engine
from server.errors import Mapping, mapping_of
from server.routes import adapters, artifacts, body, generation, models, operation, tokens, upload
from steering import errors as steering_errors

# A class stands for the code of the route's own kind of artifact, a pair for those of the kinds that it names.
Failure: TypeAlias = type[Exception] | tuple[type[Exception], tuple[str, ...]]
Failures: TypeAlias = tuple[Failure, ...]

ALWAYS: Failures = (core.GatewayError,)
OF_ACCESS: dict[str, Failures] = {
    "public": (),
    "inference": (auth.MissingKey, auth.InvalidKey, auth.InsufficientScope),
    "admin": (auth.MissingKey, auth.InvalidKey, auth.InsufficientScope, auth.AdminDisabled, core.InvalidRequest),
}
OF_PARAMETERS: Failures = (core.InvalidRequest,)
OF_JSON: Failures = (
    *(wire.InvalidJson, wire.MissingParameter, wire.UnsupportedParameter, core.InvalidRequest),
    *(body.BodyTimeout, store.BodyTooLarge),
)

_READY: Failures = (supervisor.NotReady, supervisor.Draining, engine.EngineDeadError)
_STORE: Failures = (backing.StoreUnavailable,)
# Also where only the tokenizer of a delta is asked for.
_DELTA: Failures = ((names.BaseMismatch, ("delta",)), engine.EngineLoadError)
_LOAD: Failures = (
    *((pool.NoCapacity, ("delta",)), delta_pool.DeltaTooLarge, delta_errors.SlotError, reserve.ReserveExceeded),
    *(backing.ObjectDamaged, *_DELTA),
)
_NAME: Failures = (names.NameNotFound, *_STORE)
_CHANGE: Failures = (*_NAME, names.ArtifactBusy, backing.InsufficientStorage)
_LEAVE: Failures = (*_CHANGE, pool.ArtifactInUse, names.GenerationMismatch)
_FILE: dict[str, Failures] = {
    "deltas": (
        *(delta_errors.DeltaError, delta_errors.BaseMismatchError, archive.InvalidArchive),
        reserve.ReserveExceeded,
    ),
    "profiles": (steering_errors.ProfileError,),
    "saes": (steering_errors.SAEFormatError, steering_errors.SAEMismatchError),
    "policies": (steering_errors.PolicyError,),
}
_UPLOAD: Failures = (
    *(core.InvalidRequest, wire.MissingParameter, upload.InvalidMultipart, lifecycle.DigestMismatch),
    *(names.InvalidName, lifecycle.WrongBase, body.BodyTimeout, names.GenerationMismatch, upload.LengthRequired),
    *(store.BodyTooLarge, names.ArtifactBusy, backing.InsufficientStorage, *_STORE),
)
_GENERATION: Failures = (
    *(prompt.NoChatTemplate, gateway.ContextLengthExceeded, registry.ModelNotFound),
    *((names.NameNotFound, ("profile", "sae", "policy")), (names.BaseMismatch, ("profile", "sae"))),
    *(proof.EditNotApplied, engine.EditUnavailableError, pool.EditLoadFailed, plans.DefaultUnavailable),
    *((pool.NoCapacity, ("edit", "combination")), *_LOAD, *_STORE),
    *(admission.CallerOverloaded, admission.RateLimited, admission.ServerOverloaded, *_READY),
    *(engine.EngineError, engine.SamplingError, deadline.DeadlineExceeded),
)

OF_HANDLER: dict[Callable[..., Any], Failures] = {
    generation.chat: _GENERATION,
    generation.completions: _GENERATION,
    tokens.tokenize: (registry.ModelNotFound, prompt.NoChatTemplate, *_DELTA, *_READY),
    tokens.detokenize: (registry.ModelNotFound, *_DELTA),
    tokens.tokenizer_info: (HTTPException,),
    models.get_model: (registry.ModelNotFound,),
    artifacts.upload: _UPLOAD,
    artifacts.get: _NAME,
    artifacts.get_version: _NAME,
    artifacts.verify: _NAME,
    artifacts.move_alias: (*_CHANGE, names.GenerationMismatch),
    artifacts.delete: _LEAVE,
    artifacts.delete_version: (*_CHANGE, pool.ArtifactInUse, names.ArtifactActive),
    artifacts.load: (*_NAME, *_LOAD, *_READY),
    artifacts.unload: (*_NAME, lifecycle.ArtifactPinned, pool.ArtifactInUse),
    artifacts.pin: (*_CHANGE, *_LOAD, *_READY, delta_pool.PinLimit),
    artifacts.unpin: _CHANGE,
    adapters.load: (
        *(HTTPException, folder.PathForbidden, folder.AdapterNotFound, folder.AdapterLoaded, names.InvalidName),
        *(delta_errors.DeltaError, delta_errors.BaseMismatchError, reserve.ReserveExceeded, names.ArtifactBusy),
        *((names.GenerationMismatch, ("delta",)), backing.InsufficientStorage, *_STORE),
    ),
    adapters.unload: (HTTPException, *_LEAVE),
    operation.resume: (supervisor.Draining,),
}


# The path's word for a kind -> the kind.
_KINDS = {"deltas": "delta", "profiles": "profile", "saes": "sae", "policies": "policy"}


def mappings_of(access: str, path: str, handler: Callable[..., Any], asked: Sequence[Failures]) -> list[Mapping]:
    """How the errors of a route are answered; `asked`: those that what its request has can lead to."""
    said = next((part for part in path.split("/") if part in _KINDS), "deltas")
    failures = [*ALWAYS, *OF_ACCESS[access], *OF_HANDLER.get(handler, ())]
    failures += [failure for failures in asked for failure in failures]
    if handler is artifacts.upload:
        failures += _FILE[said]
    return [
        mapping_of(kind, about)
        for failure in failures
        for kind, abouts in (failure if isinstance(failure, tuple) else (failure, (_KINDS[said],)),)
        for about in abouts
    ]
