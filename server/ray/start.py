"""`deltaworks ray`: Ray Serve on this machine, started and ended with the command. On a cluster `serve run` or KubeRay do that."""

import contextlib
import math
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from compressors.errors import DeltaError
from server.child import free_port
from server.config import ServerSettings, Settings, SettingsError, load_auth
from server.ray.edge import CALLBACK
from server.serve import PortError, listen

if TYPE_CHECKING:
    from server.ray.deployment import Scale

_NAME = "deltaworks"
_OBJECT_STORE_BYTES = 256 << 20  # requests and answers do not go through it
_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": CALLBACK,
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its processes, which ask nobody for a key, talk over loopback here too
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # Ray ends a proxy that takes 5 s to start, and starts another
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
}


def serve_on_ray(
    model: str, settings: Settings, scale: dict[str, Any], config: Path | None, flags: Mapping[str, Mapping[str, Any]]
) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status; errors of the start are printed, one line each.

    `scale`: deployment.Scale, not checked yet. `settings` come from `config` and `flags`, and keys from there again.
    """
    os.environ.update(_ENVIRONMENT)  # before Ray is imported; its processes inherit it
    try:
        from server.ray.deployment import Scale, application
    except ModuleNotFoundError as error:
        print(f"error: {error}; pip install 'deltaworks[ray]'", file=sys.stderr)
        return 1
    try:
        wanted = _checked(Scale, scale)
        target = application(model, settings, wanted, partial(load_auth, config, flags))
        cpus = max(math.ceil(wanted.replicas * wanted.cpus), os.cpu_count() or 1)
        _run(target, settings.server.host, _free(settings.server), cpus)
    except (PortError, SettingsError, DeltaError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _checked(kind: "type[Scale]", scale: dict[str, Any]) -> "Scale":
    """Raises SettingsError."""
    try:
        return kind.model_validate(scale)
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}") from None


def _run(target: Any, host: str, port: int, cpus: int) -> None:
    """Raises RuntimeError where no replica starts."""
    from ray import serve

    with _ray(cpus), contextlib.suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has set one of its own
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        try:
            print(f"listening on http://{host}:{port}, the model is loading", flush=True)
            serve.run(target, name=_NAME)
            print(f"ready: http://{host}:{port}/v1", flush=True)
            signal.pause()
        finally:
            with contextlib.suppress(TimeoutError):  # after a minute
                serve.delete(_NAME)  # replicas drain while the proxies still pass their answers on
            serve.shutdown()


@contextlib.contextmanager
def _ray(cpus: int) -> Iterator[None]:
    """A Ray of its own. `cpus` is a number to give out, and holds no replica to it."""
    import ray

    ray.init(
        "local",
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
    )
    try:
        yield
    finally:
        ray.shutdown()


def _free(settings: ServerSettings) -> int:
    """The proxy's port, which Ray would only fail to take minutes later. Raises PortError."""
    if settings.port == 0:
        return free_port()
    listen(settings.host, settings.port, "--port").close()
    return settings.port
