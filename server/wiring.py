"""Settings, and what differs between production and tests -> the collaborators of the application."""

from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from server.admission import Admission
from server.artifacts.checks import Checks
from server.artifacts.combination_pool import CombinationPool
from server.artifacts.delta_pool import DeltaPool
from server.artifacts.lifecycle import DeltaLifecycle, Lifecycle, ProfileLifecycle
from server.artifacts.pool import EditPool
from server.artifacts.registry import POLICY, PROFILE, SAE, DeltaRegistry, Registry, Shelf
from server.artifacts.store import Store
from server.artifacts.versions import PolicyVersion, ProfileVersion, Ref, SAEVersion
from server.config import AuthSettings, Settings, SteeringSettings, ToolsSettings
from server.core import ProfileSteering
from server.engine.base import Engine
from server.gate import Gate
from server.gate_policies import Policies
from server.gate_probes import Prober
from server.gateway import Gateway
from server.keys import Keys, plain_keys
from server.own_tokenizers import OwnTokenizers
from server.prompt import PromptRenderer, Tokenizer
from server.routes.context import Context, Limits
from server.steering import Planner
from server.supervisor import EngineMetrics
from server.telemetry import Telemetry
from server.tool_template import choose
from server.tools import Toolbox
from server.turns import TurnMetrics, Turns
from server.wire import Unread


@dataclass(frozen=True)
class Base:
    """The running base: its id in the API, and the fingerprint of its tensors."""

    id: str
    fingerprint: str


def wire(
    settings: Settings,
    store: Store,
    base: Base,
    engine: Engine,
    tokenizer: Tokenizer,
    checks: Checks,
    own: OwnTokenizers[Any] | None = None,
) -> tuple[Context, Keys]:
    """`store` is open already; `own`: tokenizers of deltas. Raises StoreError for damaged names, ToolTemplateError."""
    limits = settings.admission
    telemetry = Telemetry(CollectorRegistry())
    admission = Admission(limits.max_concurrent, limits.max_queued_tokens)
    telemetry.watch_admission(lambda: admission.rows, lambda: admission.queued_tokens)
    telemetry.watch_store(lambda: store.nbytes)
    shelf = Shelf(store)
    deltas = DeltaRegistry(shelf, base.id, settings.engine.reserved_tokens)
    profiles = Registry(shelf, PROFILE, Ref[ProfileVersion])
    saes = Registry(shelf, SAE, Ref[SAEVersion])
    policies = Registry(shelf, POLICY, Ref[PolicyVersion])
    shelf.recover()
    pool = _delta_pool(settings, engine, telemetry)
    edits = EditPool(engine, settings.engine.max_resident_edits, limits.edit_wait_s, telemetry.edits)
    tools = settings.tools
    prompts = _prompts(tools, tokenizer, own)
    toolbox = Toolbox(tools.parser, tools.exclude_when_none, tools.drop_unknown, tools.max_tools)
    planner = _planner(settings.steering, base, prompts, profiles, saes)
    known = Policies(policies, base.fingerprint, prompts.tool_template_sha256)
    prober = Prober(engine, prompts, planner, edits, admission)
    gate = Gate(settings.gate, known, prober, base.fingerprint)
    drain_s = limits.drain_timeout_s
    context = Context(
        gateway=Gateway(
            engine,
            deltas,
            pool,
            planner,
            edits,
            admission,
            prompts,
            toolbox,
            gate,
            _turns(settings, telemetry),
            settings.engine.restart,
            EngineMetrics(telemetry.registry),
        ),
        registry=deltas,
        admission=admission,
        pool=pool,
        edits=edits,
        deltas=DeltaLifecycle(store, deltas, pool, checks.delta, telemetry, drain_s),
        profiles=ProfileLifecycle(store, profiles, edits, checks.profile, telemetry, drain_s, policies),
        saes=Lifecycle(store, saes, edits, checks.sae, telemetry, drain_s),
        policies=Lifecycle(store, policies, known, checks.policy, telemetry, drain_s),
        telemetry=telemetry,
        limits=_limits(settings),
        prompts=prompts,
        unread=Unread(),
    )
    return context, _keys(settings.auth)


def _turns(settings: Settings, telemetry: Telemetry) -> Turns:
    """A few rows more than the engine runs, so that it never waits for us."""
    engine = settings.engine
    rows = settings.admission.max_running or engine.max_num_seqs + max(1, engine.max_num_seqs // 8)
    return Turns(rows, engine.deltas_per_batch, TurnMetrics(telemetry.registry))


def _keys(auth: AuthSettings) -> Keys:
    """Admin keys alone leave inference open; any other key that may infer closes it."""
    api, admin = ([key.get_secret_value() for key in keys] for keys in (auth.api_keys, auth.admin_keys))
    named = [entry.key() for entry in auth.keys]
    closed = bool(api) or any("inference" in key.caller.scopes for key in named)
    return Keys([*plain_keys(api, admin), *named], inference_open=not closed)


def _planner(
    settings: SteeringSettings,
    base: Base,
    prompts: PromptRenderer,
    profiles: Registry[ProfileVersion],
    saes: Registry[SAEVersion],
) -> Planner:
    return Planner(
        profiles,
        saes,
        base.fingerprint,
        prompts.template_sha256,
        settings.max_strength,
        _default_steering(settings),
        settings.allow_opt_out,
    )


def _limits(settings: Settings) -> Limits:
    edge = settings.server
    return Limits(
        edge.max_body_bytes,
        edge.max_upload_bytes,
        edge.default_max_tokens,
        edge.body_timeout_s,
        edge.request_timeout_s,
        settings.engine.scheduling_policy == "priority",
        edge.tokenizer_info,
        edge.keep_alive_s,
    )


def _prompts(tools: ToolsSettings, tokenizer: Tokenizer, own: OwnTokenizers[Any] | None) -> PromptRenderer:
    template = choose(tools.template, tools.parser, tokenizer.own_tool_template)
    return PromptRenderer(tokenizer, template, tools.parser, own.of if own else lambda delta: None)


def _default_steering(settings: SteeringSettings) -> ProfileSteering | None:
    """`field`: where a request says what of it can be changed, the profile whose probe scores."""
    chosen = settings.default
    return ProfileSteering("conflict", chosen.profile, chosen.direction, chosen.strength) if chosen else None


def _delta_pool(settings: Settings, engine: Engine, telemetry: Telemetry) -> DeltaPool:
    room, limits = settings.engine, settings.admission
    combinations = CombinationPool(engine, room.max_resident_combinations, limits.delta_wait_s, telemetry.combinations)
    return DeltaPool(
        engine,
        room.max_resident_deltas,
        limits.delta_wait_s,
        telemetry.deltas,
        combinations,
        room.max_resident_delta_bytes,
        room.max_packed_delta_bytes,
        limits.failed_load_s,
    )
