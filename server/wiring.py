"""Settings, and what differs between production and tests -> the collaborators of the application."""

from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from server.admission import Admission
from server.artifacts.lifecycle import DeltaLifecycle, Verify
from server.artifacts.pool import Pool
from server.artifacts.registry import Registry
from server.artifacts.store import Store
from server.auth import Keyring
from server.config import Settings
from server.engine.base import Engine
from server.gateway import Gateway
from server.prompt import PromptRenderer, Tokenizer
from server.routes.context import Context, Limits
from server.telemetry import Telemetry


@dataclass(frozen=True)
class Base:
    """The running base: its id in the API, and the fingerprint of its tensors."""

    id: str
    fingerprint: str


def wire(
    settings: Settings, store: Store, base: Base, engine: Engine, tokenizer: Tokenizer, verify: Verify
) -> tuple[Context, Keyring]:
    """`store` is open already. Raises StoreError when its names cannot be recovered."""
    limits = settings.admission
    telemetry = Telemetry(CollectorRegistry())
    admission = Admission(limits.max_concurrent, limits.max_queued_tokens)
    telemetry.watch_admission(lambda: admission.rows, lambda: admission.queued_tokens)
    registry = Registry(store, base.id)
    registry.recover()
    pool = Pool(engine, settings.engine.max_resident_deltas, limits.delta_wait_s, telemetry)
    gateway = Gateway(engine, registry, pool, admission, PromptRenderer(tokenizer), base.fingerprint)
    deltas = DeltaLifecycle(store, registry, pool, verify, telemetry, limits.drain_timeout_s)
    edge = settings.server
    context = Context(
        gateway=gateway,
        registry=registry,
        admission=admission,
        pool=pool,
        deltas=deltas,
        telemetry=telemetry,
        limits=Limits(edge.max_body_bytes, edge.max_upload_bytes, edge.default_max_tokens),
    )
    auth = settings.auth
    keyring = Keyring(
        [key.get_secret_value() for key in auth.api_keys], [key.get_secret_value() for key in auth.admin_keys]
    )
    return context, keyring
