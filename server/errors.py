"""The one table: error class -> (status, type, code), and the one body shape of every error on every path.

GatewayError        server/core.py, and its children beside the code that raises them
EngineError         server/engine/base.py
DeltaError          compressors/errors.py
SteeringError       steering/errors.py
HTTPException       routing's own 404 and 405, in the same shape
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Match

from compressors import errors as delta_errors
from server import admission, auth, core, deadline, gateway, prompt, proof, supervisor, wire
from server import steering as plans
from server.artifacts import adapters, archive, backing, delta_pool, lifecycle, names, pool, registry, reserve, store
from server.engine import base as engine
from server.ray import gone
from server.routes import body, upload
from server.telemetry import KINDS, Exchange
from steering import errors as steering_errors


@dataclass(frozen=True)
class Mapping:
    """How one error class is answered. `message` replaces the error's own where that could tell too much.

    "{kind}" in a code is the kind of artifact that the error is about.
    """

    status: int
    type: str
    code: str
    message: str | None = None


@dataclass(frozen=True)
class Problem:
    status: int
    code: str
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


REQUEST, CONFLICT, STORAGE = "invalid_request_error", "conflict_error", "storage_error"
UNAVAILABLE, RATE = "service_unavailable_error", "rate_limit_error"
_MAX_MESSAGE = 1000  # characters

TABLE: dict[type[Exception], Mapping] = {
    core.GatewayError: Mapping(500, "server_error", "internal_error", "internal error"),
    names.KindError: Mapping(500, "server_error", "internal_error", "internal error"),
    core.InvalidRequest: Mapping(400, REQUEST, "invalid_value"),
    wire.InvalidJson: Mapping(400, REQUEST, "invalid_json"),
    wire.MissingParameter: Mapping(400, REQUEST, "missing_parameter"),
    wire.UnsupportedParameter: Mapping(400, REQUEST, "unsupported_parameter"),
    prompt.NoChatTemplate: Mapping(400, REQUEST, "no_chat_template"),
    gateway.ContextLengthExceeded: Mapping(400, REQUEST, "context_length_exceeded"),
    upload.InvalidMultipart: Mapping(400, REQUEST, "invalid_multipart"),
    archive.InvalidArchive: Mapping(400, REQUEST, "archive_invalid"),
    lifecycle.DigestMismatch: Mapping(400, REQUEST, "digest_mismatch"),
    names.InvalidName: Mapping(400, REQUEST, "invalid_value"),
    auth.MissingKey: Mapping(401, "authentication_error", "missing_api_key"),
    auth.InvalidKey: Mapping(401, "authentication_error", "invalid_api_key"),
    auth.AdminDisabled: Mapping(403, "permission_error", "admin_disabled"),
    auth.InsufficientScope: Mapping(403, "permission_error", "insufficient_scope"),
    adapters.PathForbidden: Mapping(403, "permission_error", "path_forbidden"),
    adapters.AdapterNotFound: Mapping(404, "not_found_error", "lora_adapter_not_found"),
    adapters.AdapterLoaded: Mapping(400, REQUEST, "lora_adapter_already_loaded"),
    registry.ModelNotFound: Mapping(404, "not_found_error", "model_not_found"),
    names.NameNotFound: Mapping(404, "not_found_error", "{kind}_not_found"),
    body.BodyTimeout: Mapping(408, "timeout_error", "body_timeout"),
    names.GenerationMismatch: Mapping(409, CONFLICT, "{kind}_generation_mismatch"),
    names.ArtifactActive: Mapping(409, CONFLICT, "{kind}_in_use"),
    pool.ArtifactInUse: Mapping(409, CONFLICT, "{kind}_in_use"),
    lifecycle.WrongBase: Mapping(400, REQUEST, "{kind}_base_mismatch"),
    lifecycle.ArtifactPinned: Mapping(409, CONFLICT, "{kind}_pinned"),
    delta_pool.PinLimit: Mapping(409, CONFLICT, "{kind}_pin_limit"),
    names.BaseMismatch: Mapping(409, CONFLICT, "{kind}_base_mismatch"),
    proof.EditNotApplied: Mapping(409, CONFLICT, "edit_not_applied"),
    upload.LengthRequired: Mapping(411, REQUEST, "length_required"),
    store.BodyTooLarge: Mapping(413, REQUEST, "body_too_large"),
    names.ArtifactBusy: Mapping(429, RATE, "{kind}_busy"),
    admission.CallerOverloaded: Mapping(429, RATE, "tenant_concurrency_exceeded"),
    admission.RateLimited: Mapping(429, RATE, "rate_limit_exceeded"),
    body.ClientGone: Mapping(499, REQUEST, "client_gone"),
    admission.ServerOverloaded: Mapping(503, UNAVAILABLE, "server_overloaded"),
    supervisor.NotReady: Mapping(503, UNAVAILABLE, "loading"),
    supervisor.Draining: Mapping(503, UNAVAILABLE, "draining"),
    gone.ReplicaGone: Mapping(503, UNAVAILABLE, "replica_gone"),
    pool.NoCapacity: Mapping(503, UNAVAILABLE, "{kind}_capacity"),
    backing.ObjectDamaged: Mapping(503, UNAVAILABLE, "store_unavailable"),
    backing.StoreUnavailable: Mapping(503, UNAVAILABLE, "store_unavailable"),
    plans.DefaultUnavailable: Mapping(503, UNAVAILABLE, "default_steering_unavailable"),
    deadline.DeadlineExceeded: Mapping(504, "timeout_error", "deadline_exceeded"),
    delta_pool.DeltaTooLarge: Mapping(507, STORAGE, "delta_too_large"),
    reserve.ReserveExceeded: Mapping(507, STORAGE, "vocabulary_reserve_exceeded"),
    backing.InsufficientStorage: Mapping(507, STORAGE, "insufficient_storage"),
    engine.EngineError: Mapping(500, "server_error", "engine_error", "the engine failed on this request"),
    engine.EngineDeadError: Mapping(503, UNAVAILABLE, "engine_dead", "the engine has stopped"),
    engine.EngineLoadError: Mapping(500, "server_error", "delta_load_failed", "the delta could not be loaded"),
    engine.SamplingError: Mapping(400, REQUEST, "invalid_value"),
    engine.GrammarError: Mapping(400, REQUEST, "invalid_value"),
    engine.EditUnavailableError: Mapping(409, CONFLICT, "edit_unavailable"),
    pool.EditLoadFailed: Mapping(500, "server_error", "edit_load_failed"),
    delta_errors.DeltaError: Mapping(400, REQUEST, "delta_invalid"),
    delta_errors.ArtifactError: Mapping(400, REQUEST, "delta_invalid"),
    delta_errors.FormatVersionError: Mapping(400, REQUEST, "delta_invalid"),
    delta_errors.UnknownMethodError: Mapping(400, REQUEST, "delta_invalid"),
    delta_errors.BaseMismatchError: Mapping(400, REQUEST, "delta_base_mismatch"),
    delta_errors.CheckpointError: Mapping(400, REQUEST, "delta_invalid"),
    delta_errors.BudgetError: Mapping(400, REQUEST, "delta_invalid"),
    delta_errors.SlotError: Mapping(507, STORAGE, "delta_too_large"),
    steering_errors.SteeringError: Mapping(400, REQUEST, "steering_invalid"),
    steering_errors.ProfileError: Mapping(400, REQUEST, "profile_invalid"),
    steering_errors.SAEFormatError: Mapping(400, REQUEST, "sae_invalid"),
    steering_errors.SAEMismatchError: Mapping(400, REQUEST, "sae_mismatch"),
    steering_errors.EditError: Mapping(400, REQUEST, "invalid_value"),
    steering_errors.FitError: Mapping(400, REQUEST, "steering_invalid"),
    steering_errors.PolicyError: Mapping(400, REQUEST, "policy_invalid"),
    steering_errors.LabelError: Mapping(400, REQUEST, "steering_invalid"),
    steering_errors.EndpointError: Mapping(400, REQUEST, "steering_invalid"),
}

_INTERNAL = TABLE[core.GatewayError]
_ROUTING = {
    404: Mapping(404, "not_found_error", "route_not_found", "there is no such route"),
    405: Mapping(405, REQUEST, "method_not_allowed", "the route does not answer to that method"),
}


def codes() -> set[str]:
    """Every code that an answer may carry; those of a kind, for every kind."""
    kinds = (*KINDS, "edit", "combination")
    told = [*TABLE.values(), *_ROUTING.values()]
    return {mapping.code.format(kind=kind) for mapping in told for kind in kinds}


def mapping_of(kind: type[Exception], about: str) -> Mapping:
    """How an error of that class is answered where it is about that kind of artifact."""
    mapping = _ROUTING[404] if kind is HTTPException else TABLE[kind]
    return replace(mapping, code=mapping.code.format(kind=about))


def describe(error: Exception) -> Problem:
    """What to answer for any error; classes that are not in the table are our bugs: 500, and no word about them."""
    mapping = next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), _INTERNAL)
    param = getattr(error, "param", None) if mapping.message is None else None
    headers = {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(retry_after_s))
        headers["retry-after-ms"] = str(math.ceil(1000 * retry_after_s))  # clients of OpenAI's read it first
    elif mapping.status in (409, 501, 507):  # clients retry these by default, and it would not help
        headers["x-should-retry"] = "false"
    if mapping.status == 408:
        headers["connection"] = "close"  # the rest of the body is not read
    if mapping.status == 401:
        headers["www-authenticate"] = "Bearer"
    code = mapping.code.format(kind=getattr(error, "kind", ""))
    return _problem(replace(mapping, code=code), mapping.message or str(error)[:_MAX_MESSAGE], param, headers)


async def answer(request: Request, error: Exception) -> JSONResponse:
    """Starlette's exception handler for every class that `create_app` registers."""
    if isinstance(error, HTTPException):
        mapping = _ROUTING.get(error.status_code, Mapping(error.status_code, REQUEST, "http_error", str(error.detail)))
        headers = {"allow": _allowed(request)} if error.status_code == 405 else dict(error.headers or {})
        problem = _problem(mapping, mapping.message or "", None, headers)
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        problem = _problem(TABLE[core.InvalidRequest], first["msg"], str(first["loc"][-1]), {})
    else:
        problem = describe(error)
    exchange = Exchange.of(request.scope)
    exchange.error_code = problem.code
    exchange.error = error if problem.status >= 500 else None
    exchange.gone_at = error.at if isinstance(error, body.ClientGone) else None
    return JSONResponse(problem.body, problem.status, problem.headers)


def _allowed(request: Request) -> str:
    """The methods of all routes of that path; Starlette tells those of the first."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in routes for method in route.methods}))


def _problem(mapping: Mapping, message: str, param: str | None, headers: dict[str, str]) -> Problem:
    error = {"message": message, "type": mapping.type, "param": param, "code": mapping.code}
    return Problem(mapping.status, mapping.code, {"error": error}, headers)
