"""The wire form of the admin plane's answers: names, their versions, and what is in memory."""

from typing import Literal

from pydantic import Field
from typing_extensions import TypedDict

from server.answers import ByKind
from server.artifacts.versions import DeltaVersion, PolicyVersion, ProfileVersion, SAEVersion
from server.core import ArtifactState
from server.supervisor import State


def _is_none(value: object) -> bool:
    return value is None


class DeltaVersionCard(DeltaVersion):
    state: ArtifactState
    resident_bytes: int | None
    in_flight: int


class ProfileVersionCard(ProfileVersion):
    resident_edits: int
    in_flight: int
    state: Literal["failed"] | None = Field(default=None, exclude_if=_is_none)


class SAEVersionCard(SAEVersion):
    resident_edits: int
    in_flight: int
    state: Literal["failed"] | None = Field(default=None, exclude_if=_is_none)


class PolicyVersionCard(PolicyVersion):
    state: Literal["failed"] | None = Field(default=None, exclude_if=_is_none)


class Named(TypedDict):
    name: str
    digest: str | None
    generation: int


class DeltaCard(Named):
    object: Literal["delta"]
    versions: list[DeltaVersionCard]
    pinned: bool


class ProfileCard(Named):
    object: Literal["profile"]
    versions: list[ProfileVersionCard]


class SAECard(Named):
    object: Literal["sae"]
    versions: list[SAEVersionCard]


class PolicyCard(Named):
    object: Literal["policy"]
    versions: list[PolicyVersionCard]


class Page(TypedDict):
    object: Literal["list"]
    has_more: bool


class DeltaPage(Page):
    data: list[DeltaCard]


class ProfilePage(Page):
    data: list[ProfileCard]


class SAEPage(Page):
    data: list[SAECard]


class PolicyPage(Page):
    data: list[PolicyCard]


class VersionCheck(TypedDict):
    digest: str
    ok: bool
    problem: str | None


class Verification(TypedDict):
    object: str
    name: str
    ok: bool
    checks: list[VersionCheck]


class RunningBase(TypedDict):
    id: str
    fingerprint: str


class ResidentDelta(TypedDict):
    digest: str
    names: list[str]
    resident_bytes: int | None
    in_flight: int
    pinned: bool


class Status(TypedDict):
    state: State
    base: RunningBase
    max_model_len: int | None
    max_resident_deltas: int
    resident_bytes: int
    max_resident_delta_bytes: int | None
    resident: list[ResidentDelta]
    resident_combinations: int
    max_resident_combinations: int
    max_packed_delta_bytes: int
    packed_bytes: int
    packed_deltas: int
    max_resident_edits: int
    resident_edits: int
    rows_in_flight: int
    queued_tokens: int


CARD = ByKind({"deltas": DeltaCard, "profiles": ProfileCard, "saes": SAECard, "policies": PolicyCard})
PAGE = ByKind({"deltas": DeltaPage, "profiles": ProfilePage, "saes": SAEPage, "policies": PolicyPage})
VERSION_CARD = ByKind(
    {
        "deltas": DeltaVersionCard,
        "profiles": ProfileVersionCard,
        "saes": SAEVersionCard,
        "policies": PolicyVersionCard,
    }
)
