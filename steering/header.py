"""Headers of the two files that steering is served from, readable without torch: profiles and one-file SAEs.

Both are safetensors files whose metadata holds one JSON object; nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steering.errors import ProfileError, SAEFormatError, SteeringError

PROFILE_KEY = "deltaworks.profile"
SAE_KEY = "deltaworks.sae"
MAXIMA = "max"  # the tensor of a one-file SAE with the largest activation of each latent [n], fp32
_MAX_HEADER = 16 << 20
Scalar = str | int | float | bool | None
HeaderT = TypeVar("HeaderT", bound=BaseModel)


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DirectionHeader(_Header):
    """Where a direction edits, and the strength that it was tuned at."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    strength: Annotated[float, Field(gt=0)] = 2.0


class LayerHeader(_Header):
    """One layer of a profile: the SAE that it was fitted with, and how many latents stand for each source."""

    sae_sha256: str
    input_norm: Literal["none", "constant_norm", "layer_norm"] = "none"
    n_context: Annotated[int, Field(ge=0)]
    n_parameter: Annotated[int, Field(ge=0)]


class ProbeHeader(_Header):
    """The probe: where it reads, its decision threshold, and how good it is on held-out questions."""

    layer: Annotated[int, Field(ge=0)]
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    auroc: Annotated[float, Field(ge=0, le=1)]
    accuracy: Annotated[float, Field(ge=0, le=1)]
    n: Annotated[int, Field(gt=0)]


class ProfileHeader(_Header):
    """A SpARE profile, or a probe alone, without directions and layers.

    `template_sha256` names the prompt template that it was fitted on: sha256 of its text, or empty.
    """

    format_version: Literal[1] = 1
    base_fingerprint: str
    model_name: str
    template_sha256: str
    d_in: Annotated[int, Field(gt=0)]
    directions: dict[Literal["use_context", "use_parameter"], DirectionHeader] = {}
    layers: dict[Annotated[int, Field(ge=0)], LayerHeader] = {}
    fit: dict[str, Scalar] = {}
    metrics: dict[str, Scalar] = {}
    probe: ProbeHeader | None = None

    @model_validator(mode="after")
    def _steers_or_reads(self) -> Self:
        if bool(self.directions) != bool(self.layers):
            raise ValueError("directions and layers are there together, or neither")
        if not self.directions and self.probe is None:
            raise ValueError("directions: nothing is steered, and there is no probe either")
        return self


class SAEHeader(_Header):
    """An SAE as one file. `base_fingerprint` is None where it is not known which weights it was trained on."""

    format_version: Literal[1] = 1
    architecture: Literal["standard", "topk", "jumprelu", "gated"]
    hook_layer: Annotated[int, Field(ge=0)]
    hook_point: Literal["resid_post"] = "resid_post"
    normalize: Literal["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"] = "none"
    scale: Annotated[float, Field(gt=0)] | None = None
    k: Annotated[int, Field(gt=0)] | None = None
    subtract_b_dec: bool = True
    rescale_by_decoder_norm: bool = False
    model_name: str = ""
    base_fingerprint: str | None = None
    d_in: Annotated[int, Field(gt=0)]
    d_sae: Annotated[int, Field(gt=0)]


def file_sha256(path: Path) -> str:
    """In hexadecimal: how a store names the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_header(path: Path) -> ProfileHeader:
    """Raises ProfileError."""
    return _read(path, PROFILE_KEY, ProfileHeader, "a profile", ProfileError)


def read_sae_header(path: Path) -> SAEHeader:
    """Raises SAEFormatError."""
    return _read(path, SAE_KEY, SAEHeader, "a one-file SAE", SAEFormatError)


def has_maxima(path: Path) -> bool:
    """Whether a one-file SAE records the largest activation of each latent. Raises OSError, ValueError for other files."""
    with path.open("rb") as file:
        return MAXIMA in _header_of(file)[0]


def read_maxima(path: Path, ids: Sequence[int]) -> list[float]:
    """The largest recorded activations of the latents `ids` of a checked one-file SAE that has them; nothing else is read."""
    with path.open("rb") as file:
        header, data = _header_of(file)
        start = data + header[MAXIMA]["data_offsets"][0]
        found: list[float] = []
        for latent in ids:
            file.seek(start + 4 * latent)
            found += struct.unpack("<f", file.read(4))
    return found


def metadata_of(key: str, header: BaseModel) -> dict[str, str]:
    """The metadata of a safetensors file with this header: canonical JSON, so that equal content gives equal bytes."""
    return {key: json.dumps(header.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))}


def _read(path: Path, key: str, kind: type[HeaderT], what: str, error: type[SteeringError]) -> HeaderT:
    try:
        metadata = _metadata(path)
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"the file is not {what}: {problem or 'its header cannot be read'}") from problem
    text = metadata.get(key)
    if not isinstance(text, str):
        raise error(f"the file is not {what}: its metadata lacks {key!r}")
    try:
        return kind.model_validate_json(text)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise error(f"the header of {what} is wrong: {field}: {first['msg']}") from problem


def _metadata(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        metadata = _header_of(file)[0].get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _header_of(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where their data begins. Raises ValueError."""
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    text = file.read(length) if len(prefix) == 8 and length <= _MAX_HEADER else b""
    if not text.startswith(b"{"):  # only then: the length of a good header may begin with the bytes of a pickle
        if prefix[:2] == b"PK" or prefix[:1] == b"\x80":
            raise ValueError("it is a pickle (a PyTorch .pt or .bin file), which is never loaded")
        raise ValueError("it is no safetensors file, or a damaged one")
    found = json.loads(text)
    return (found if isinstance(found, dict) else {}), 8 + length
