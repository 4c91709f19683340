"""Tokenizers of fine-tunes that have one of their own: loaded from their deltas when first asked for, the last ones kept."""

import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from compressors.artifact import Artifact
from compressors.errors import ArtifactError, DeltaError
from compressors.tokenizer import write
from server.engine.base import EngineDelta, EngineLoadError
from server.prompt import HuggingFaceTokenizer, Tokenizer, TokenizerError

T = TypeVar("T", bound=Tokenizer)


def loader(base: Path) -> Callable[[Path], HuggingFaceTokenizer]:
    """Loads the tokenizer in a delta file of this base. Raises DeltaError, OSError."""

    def load(path: Path) -> HuggingFaceTokenizer:
        with tempfile.TemporaryDirectory() as folder, Artifact.open(path) as artifact:
            write(artifact, base, Path(folder))
            try:
                return HuggingFaceTokenizer(Path(folder))
            except TokenizerError as error:
                raise ArtifactError(f"the delta's tokenizer cannot be used: {error.__cause__ or error}") from error

    return load


class OwnTokenizers(Generic[T]):
    """Named by what they are, so that deltas with the same tokenizer share it. Requests keep theirs when it is dropped here."""

    def __init__(self, load: Callable[[Path], T], room: int) -> None:
        self._load = load
        self._room = room
        self._kept: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, delta: EngineDelta | None) -> T | None:
        """A fine-tune's own; None where it uses the base's. Blocking. Raises EngineLoadError."""
        if delta is None or not delta.tokenizer:
            return None
        with self._lock:  # loads one at a time, and each once
            tokenizer = self._kept.get(delta.tokenizer)
            if tokenizer is None:
                tokenizer = self._loaded(delta)
                if len(self._kept) >= self._room:
                    self._kept.popitem(last=False)
                self._kept[delta.tokenizer] = tokenizer
            self._kept.move_to_end(delta.tokenizer)
        return tokenizer

    def _loaded(self, delta: EngineDelta) -> T:
        file = delta.parts[0].delta if delta.parts else delta  # the parts of a combination have the same
        try:
            return self._load(Path(file.path))
        except (DeltaError, OSError) as error:
            raise EngineLoadError(f"the tokenizer of delta {file.digest:.12} cannot be loaded: {error}") from error
