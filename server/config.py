"""Settings: one TOML file, environment overrides, nothing else. Read once, in the CLI; components get plain values.

Precedence: command line, then `DELTAWORKS__SECTION__KEY`, then the file, then the defaults below.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from server.core import GateMode
from server.keys import Caller, Key, KeyLimits, Scope, as_stored

ENV_PREFIX = "DELTAWORKS__"


class SettingsError(Exception):
    """The settings cannot be used; the message names the key and where it came from."""


def _split_commas(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _hashed(keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    return tuple(SecretStr(as_stored(key.get_secret_value())) for key in keys)


KeyList = Annotated[tuple[SecretStr, ...], BeforeValidator(_split_commas), AfterValidator(_hashed)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ServerSettings(Section):
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    admin_port: int | None = Field(default=None, ge=0, le=65535)  # the admin plane alone listens here; None: on `port`
    served_name: str | None = None  # id of the base in /v1/models; default: the base folder's name
    max_body_bytes: int = Field(default=4 << 20, ge=1024)
    max_upload_bytes: int = Field(default=8 << 30, ge=1024)
    default_max_tokens: int = Field(
        default=4096, ge=1
    )  # where a request names no limit: this, or what the context leaves
    # From the request's arrival to the end of its answer; None: as long as the client stays. x-request-timeout-ms asks for less.
    request_timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    body_timeout_s: float = Field(default=30.0, gt=0)  # for a body, and for every 64 KiB of an upload
    header_timeout_s: float = Field(default=10.0, gt=0)  # for a connection to bring the head of a request
    max_header_bytes: int = Field(default=64 << 10, ge=1024)  # of that head
    tokenizer_info: bool = False  # whether /tokenizer_info tells special tokens and the chat template
    keep_alive_s: float = Field(
        default=15.0, ge=0, allow_inf_nan=False
    )  # a stream that is silent that long sends a comment; 0: none
    shutdown_timeout_s: int = Field(default=30, ge=0)  # running requests may finish this long after SIGTERM

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        if self.admin_port and self.admin_port == self.port:
            raise ValueError("admin_port is port; leave it out to serve the admin plane there")
        return self


class StoreSettings(Section):
    """`path` is a folder, or s3://BUCKET/PREFIX (extra s3; keys and region as AWS clients read them). Servers may share either."""

    path: str = "~/.local/share/deltaworks/store"
    max_bytes: int | None = Field(default=None, ge=1024)  # of all artifacts in the store; None: what it has room for
    refresh_s: float = Field(
        default=2.0, gt=0, le=60
    )  # how often the names are read that other servers may have changed
    endpoint_url: str | None = None  # of an S3-compatible server; None: AWS
    cache_path: Path = Path("~/.cache/deltaworks/store")  # objects of a bucket as local files, a folder for each server
    max_cache_bytes: int | None = Field(default=None, ge=1024)  # of those; None: all that a name refers to
    lora_root: Path | None = None  # what POST /v1/load_lora_adapter may load lies in it; None: there is no such route
    delta_dir: Path | None = None  # NAME.safetensors and PEFT folders NAME in it are published, again when they change


class RestartSettings(Section):
    """Of an engine that died by itself, or stalled; the wait doubles with every death in a row, to a minute at most."""

    max_restarts: int = Field(default=5, ge=0)  # in a row; then the engine is given up and /health/live turns red
    backoff_s: float = Field(default=1.0, ge=0, le=60)  # before the first restart
    reset_s: float = Field(default=120.0, ge=0)  # an engine that was up for that long has not died in a row
    stall_s: float = Field(default=300.0, ge=0, allow_inf_nan=False)  # see Engine.signs; 0: it is waited for for ever


class EngineSettings(Section):
    dtype: str = "auto"
    max_model_len: int | None = Field(default=None, ge=16)
    kv_cache_bytes: int | None = Field(default=None, ge=1 << 20)
    deltas_per_batch: int = Field(default=8, ge=1)
    max_resident_deltas: int = Field(default=16, ge=1)  # in execution form
    max_resident_delta_bytes: int | None = Field(
        default=None, ge=1
    )  # in execution form; None: only their number counts
    max_packed_delta_bytes: int = Field(default=1 << 30, ge=0)  # files of deltas kept in RAM as they are; 0: none
    max_resident_combinations: int = Field(default=16, ge=1)  # weighted sums of resident deltas, ready to serve
    max_resident_edits: int = Field(default=64, ge=1)
    reserved_tokens: int = Field(default=0, ge=0, le=1 << 16)  # that fine-tunes may add to the vocabulary
    max_num_seqs: int = Field(default=64, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=1)  # tokens of one step; longer prompts go in chunks
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"  # priority: requests may say who goes first (`priority`)
    enforce_eager: bool = True
    kernel: Literal["auto", "native", "torch", "triton"] = (
        "auto"  # how deltas are applied: C++, torch CSR, Triton; or Triton on GPUs, and C++ where it builds
    )
    threads: int | None = Field(default=None, ge=1)
    restart: RestartSettings = RestartSettings()
    vllm: dict[str, Any] = {}  # vLLM's own engine arguments by their names, handed on (engine/flags.py)

    @model_validator(mode="after")
    def _no_secret_is_passed_on(self) -> Self:
        if "hf_token" in self.vllm:
            raise ValueError("vllm.hf_token is a secret; set HF_TOKEN in the environment instead")
        return self


class KeySettings(Section):
    """A key with a name, in a file of `[[keys]]` (`deltaworks keys new` writes one)."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")  # what the log calls it
    hash: str = Field(pattern=r"^sha256:[0-9a-f]{64}$", repr=False)  # of the key; `deltaworks keys hash`
    scopes: frozenset[Scope] = Field(default=frozenset({"inference"}), min_length=1)
    deltas: tuple[str, ...] | None = (
        None  # names that it may use, or patterns of them with *; None: all. The base: always
    )
    max_concurrent: int | None = Field(default=None, ge=1)  # rows in flight
    max_queued_tokens: int | None = Field(default=None, ge=1)
    requests_per_minute: int | None = Field(default=None, ge=1)

    def key(self) -> Key:
        limits = KeyLimits(self.max_concurrent, self.max_queued_tokens, self.requests_per_minute)
        return Key(self.hash, Caller(self.id, self.scopes, self.deltas, limits))


class AuthSettings(Section):
    """No key that may infer: inference is open. No key that may administer: the admin plane is closed. Kept as hashes."""

    api_keys: KeyList = ()
    admin_keys: KeyList = ()  # these may infer too
    api_key_file: Path | None = None  # one key a line, or its hash
    admin_key_file: Path | None = None
    key_file: Path | None = None  # TOML: `[[keys]]`, as KeySettings
    keys: tuple[KeySettings, ...] = Field(default=(), exclude=True)

    @model_validator(mode="after")
    def _keys_are_different(self) -> Self:
        ids = [key.id for key in self.keys]
        hashes = [key.hash for key in self.keys] + [key.get_secret_value() for key in self.api_keys + self.admin_keys]
        again = [key.id for key in self.keys if ids.count(key.id) > 1 or hashes.count(key.hash) > 1]
        if again:
            raise ValueError(f"the key {again[0]!r} is given twice, by name or by hash")
        return self


class AdmissionSettings(Section):
    max_running: int | None = Field(default=None, ge=1)  # rows with the engine; None: max_num_seqs and an eighth more
    max_concurrent: int = Field(default=256, ge=1)  # rows in flight: prompts times n
    max_queued_tokens: int = Field(default=262_144, ge=1)  # prompt tokens still waiting for their first output token
    delta_wait_s: float = Field(default=30.0, ge=0)  # how long a request waits for room for its delta
    failed_load_s: float = Field(default=5.0, ge=0, le=600)  # how long a delta whose load failed is not tried again
    edit_wait_s: float = Field(default=5.0, ge=0)  # how long a request waits for room for its edit
    drain_timeout_s: float = Field(default=60.0, ge=0)  # how long `DELETE ?drain=true` waits for running requests


class DefaultSteering(Section):
    """A profile for requests that bring no steering. Without `strength` the direction's own."""

    profile: str = Field(min_length=1, max_length=128)
    direction: Literal["use_context", "use_parameter"]
    strength: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class SteeringSettings(Section):
    max_strength: float = Field(default=4.0, ge=0, le=100, allow_inf_nan=False)  # the most that a request may ask for
    default: DefaultSteering | None = None
    allow_opt_out: bool = True  # whether `"steering": null` does without the default

    @model_validator(mode="after")
    def _default_is_allowed(self) -> Self:
        if self.default is not None and (self.default.strength or 0) > self.max_strength:
            raise ValueError(f"the default's strength is over max_strength {self.max_strength:g}")
        return self


class ToolsSettings(Section):
    parser: Literal["hermes", "llama3_json", "pythonic", "toolrl"] = "hermes"  # how the base writes its calls
    # auto: the model's own chat template where it mentions tools, else ours for the parser. Or "own", or the name of one
    # of ours (those of the parsers), or a file.
    template: str = Field(default="auto", min_length=1)
    exclude_when_none: bool = False  # tool_choice "none" leaves the tools out of the prompt
    drop_unknown: bool = False  # a call to a tool that the request does not have stays text
    max_tools: int = Field(default=128, ge=1)  # of one request


class GateSettings(Section):
    """The tool gate. Requests opt in where they ask for more than `mode` (off, observe, enforce), out where for less."""

    mode: GateMode = "off"
    allow_opt_in: bool = True
    allow_opt_out: bool = True
    allow_lower_threshold: bool = (
        False  # whether a request may have tools withheld on less evidence than the policy asks
    )
    timeout_ms: int = Field(default=5000, ge=1)  # of all probes of a request; the policy's own where that is less
    log_records: bool = True  # what decisions came from, as numbers, in the request log


class TelemetrySettings(Section):
    log_format: Literal["json", "text"] = "json"
    max_delta_labels: int = Field(default=50, ge=1, le=1000)  # deltas with series of their own; the rest share "other"
    otlp_endpoint: str | None = Field(
        default=None, pattern="^https?://"
    )  # OTLP over HTTP, with its path; None: no traces
    trace_share: float = Field(default=1.0, ge=0, le=1, allow_inf_nan=False)  # of requests that bring no traceparent


class Settings(Section):
    server: ServerSettings = ServerSettings()
    store: StoreSettings = StoreSettings()
    engine: EngineSettings = EngineSettings()
    auth: AuthSettings = AuthSettings()
    admission: AdmissionSettings = AdmissionSettings()
    steering: SteeringSettings = SteeringSettings()
    tools: ToolsSettings = ToolsSettings()
    gate: GateSettings = GateSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    def to_toml(self) -> str:
        """The settings in force as TOML, keys masked; unset ones are left out."""
        return "\n".join(_toml_lines(self.model_dump(mode="json", exclude_none=True), ""))


def _toml_lines(values: Mapping[str, Any], name: str) -> list[str]:
    """A section, then the sections in it."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    if lines:
        lines = [f"[{name}]", *lines, ""]
    for key, value in values.items():
        if isinstance(value, dict):
            lines += _toml_lines(value, f"{name}.{key}" if name else key)
    return lines


def load_settings(file: Path | None, environ: Mapping[str, str], flags: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Merge file, environment and command-line flags (section -> key -> value). Raises SettingsError."""
    merged: dict[str, Any] = {}
    for source in (_read_file(file) if file else {}, _read_environ(environ), flags):
        for section, values in source.items():
            if not isinstance(values, Mapping):
                raise SettingsError(f"{section!r} must be a section, written [{section}]{_near(section, ())}")
            _merge(merged.setdefault(section, {}), values)
    _add_keys(merged.setdefault("auth", {}))
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(detail) for detail in error.errors())) from None


def load_auth(file: Path | None, flags: Mapping[str, Mapping[str, Any]]) -> AuthSettings:
    """The section `auth` and its files, read again. Raises SettingsError."""
    return load_settings(file, os.environ, flags).auth


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Later values replace earlier ones key by key, also in a section of a section."""
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _read_file(file: Path, what: str = "settings file") -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"cannot read the {what} {file}: {error}") from error


def _read_environ(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    found: dict[str, Any] = {}
    for name, value in environ.items():
        if name.startswith(ENV_PREFIX):
            *sections, key = name.removeprefix(ENV_PREFIX).lower().split("__")
            if not key or not sections or not all(sections):
                raise SettingsError(f"{name}: expected {ENV_PREFIX}SECTION__KEY")
            nested: dict[str, Any] = {key: value}
            for section in reversed(sections):
                nested = {section: nested}
            _merge(found, nested)
    return found


def _near(key: str, parents: Sequence[object]) -> str:
    section: type[BaseModel] | None = Settings
    for parent in (parent for parent in parents if not isinstance(parent, int)):
        field = section.model_fields.get(str(parent)) if section else None
        section = _section_type(field.annotation) if field else None
    known = list(section.model_fields) if section else []
    match = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {match[0]!r}?)" if match else f" (known: {', '.join(known)})"


def _section_type(annotation: object) -> type[Section] | None:
    """The section that a field holds, also where it may be absent."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _explain(detail: ErrorDetails) -> str:
    *parents, key = detail["loc"]
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown setting {name!r}{_near(str(key), parents)}"
    return f"setting {name!r}: {detail['msg']}"


def _add_keys(auth: dict[str, Any]) -> None:
    """Put what the key files hold into the section that names them."""
    for keys, file in (("api_keys", "api_key_file"), ("admin_keys", "admin_key_file")):
        if isinstance(auth.get(file), str | Path):
            given = auth.get(keys, ())
            listed = given.split(",") if isinstance(given, str) else given
            auth[keys] = [*(key.strip() for key in listed if key.strip()), *_read_keys(Path(auth[file]))]
    if isinstance(auth.get("key_file"), str | Path):
        found = _read_file(Path(auth["key_file"]).expanduser(), "key file")
        if not found.get("keys") or set(found) != {"keys"}:
            raise SettingsError(f"the key file {auth['key_file']} must hold [[keys]] and nothing else")
        auth["keys"] = [*auth.get("keys", ()), *found["keys"]]


def _read_keys(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.expanduser().read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the key file {file}: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise SettingsError(f"the key file {file} holds no key; a file that protects nothing is surely a mistake")
    return keys
