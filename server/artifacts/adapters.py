"""LoRA adapters and delta files that lie in a folder of this machine, under the names that vLLM's own calls give them."""

import stat
import tempfile
from pathlib import Path

from server.artifacts.checks import Convert, path_untold
from server.artifacts.lifecycle import DeltaLifecycle
from server.artifacts.names import NameNotFound
from server.artifacts.store import Incoming
from server.core import GatewayError
from server.wire import UploadFields

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_CHUNK_BYTES = 8 << 20


class PathForbidden(GatewayError):
    """A path that does not lie in the one folder."""


class AdapterNotFound(GatewayError):
    """Nothing lies there that could be an adapter."""


class AdapterLoaded(GatewayError):
    """Another adapter has the name, and the request does not say that it is to be replaced."""


class AdapterFolder:
    """Everything under `root`, by paths that links are followed in first."""

    def __init__(self, root: Path, deltas: DeltaLifecycle, convert: Convert | None) -> None:
        self.root = root.expanduser()
        self._deltas = deltas
        self._convert = convert

    def read(self, path: str, incoming: Incoming) -> None:
        """The delta file of an adapter: itself, or what a PEFT folder becomes. Blocking.

        Raises PathForbidden, AdapterNotFound, BodyTooLarge, InsufficientStorage, DeltaError.
        """
        found = self._confined(self.root / path)
        if found.is_dir() and self._convert is not None:
            for name in _ADAPTER_FILES:
                self._confined(found / name)  # may be a link inside the root, as a model hub's cache has them
            with tempfile.TemporaryDirectory() as folder:
                converted = Path(folder, "delta.safetensors")
                with path_untold(found):
                    self._convert(found, converted)
                _copy(converted, incoming)
        elif found.suffix == ".safetensors":
            _copy(found, incoming)
        else:
            raise AdapterNotFound("that is neither a PEFT folder nor a .safetensors file", param="lora_path")

    async def publish(self, name: str, incoming: Incoming, replace: bool, expected_generation: int | None) -> None:
        """Put a delta that was read under a name, where it is not yet. Raises AdapterLoaded, and as an upload."""
        try:
            active = (await self._deltas.get(name)).digest
        except NameNotFound:
            active = None
        if active not in (None, incoming.digest) and not replace and expected_generation is None:
            raise AdapterLoaded(
                f"the LoRA adapter {name!r} has already been loaded, with other contents; set load_inplace to replace it",
                param="lora_name",
            )
        fields = UploadFields(name=name, sha256=incoming.digest, expected_generation=expected_generation)
        await self._deltas.upload(fields, incoming)

    def _confined(self, path: Path) -> Path:
        """The true place of a path that must exist. Raises PathForbidden, AdapterNotFound."""
        try:
            found = path.resolve()
            if not found.is_relative_to(self.root.resolve(strict=True)):
                raise PathForbidden("lora_path does not lie in the folder that is set for adapters", param="lora_path")
            kind = found.stat().st_mode
        except (OSError, RuntimeError, ValueError):  # not there, a loop of links, or no path at all
            raise AdapterNotFound("there is no adapter at that path", param="lora_path") from None
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise AdapterNotFound("there is no adapter at that path", param="lora_path")
        return found


def _copy(file: Path, incoming: Incoming) -> None:
    with file.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            incoming.write(chunk)
