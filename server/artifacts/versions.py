"""What is durable about artifacts: the uploaded versions of each kind, and the names that point to them."""

from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field


class Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Version(Facts):
    """One uploaded artifact under a name."""

    digest: str
    nbytes: int
    created: int  # unix seconds


class DeltaVersion(Version):
    """`chat_template` "" and `stop_ids` () = the base's."""

    method: str
    base_fingerprint: str
    ratio: float | None
    checks: tuple[str, ...]
    chat_template: str = ""
    stop_ids: tuple[int, ...] = ()


class DirectionFacts(Facts):
    """`layers` are edited at `strength` where a request says nothing else."""

    layers: tuple[int, ...]
    strength: float


class ProbeFacts(Facts):
    layer: int
    threshold: float
    auroc: float


class ProfileVersion(Version):
    """`latents`: how many latents the profile has per layer; `template_sha256` "" = fitted without a chat template."""

    base_fingerprint: str
    model_name: str
    template_sha256: str
    directions: dict[str, DirectionFacts]
    latents: dict[int, int]
    probe: ProbeFacts | None


class SAEVersion(Version):
    """`has_maxima`: the file records the largest activation of each latent."""

    base_fingerprint: str | None
    model_name: str
    architecture: str
    layer: int
    d_in: int
    d_sae: int
    has_maxima: bool = False


class PolicyVersion(Version):
    """A tool-gate policy: what it holds for, and what an operator wants to see of it. `threshold` None: never withholds."""

    policy_id: str
    model_name: str
    base_fingerprint: str
    delta_digest: str | None
    template_sha256: str
    stages: tuple[str, ...]
    threshold: float | None
    suppress_mode: str
    placement: str
    explore: float
    hidden_profile: str | None


V = TypeVar("V", bound=Version)


def _is_false(value: object) -> bool:
    return value is False


class Ref(Facts, Generic[V]):
    """A name: `digest` is what it points to (None = nothing yet), `generation` counts the moves.

    `pinned`: what it points to is to stay resident.
    """

    format: Literal[1] = 1
    name: str
    digest: str | None
    generation: int
    versions: tuple[V, ...]
    pinned: bool = Field(default=False, exclude_if=_is_false)

    def version(self, digest: str) -> V | None:
        return next((version for version in self.versions if version.digest == digest), None)

    def active(self) -> V | None:
        return self.version(self.digest) if self.digest else None

    def pointing_to(self, digest: str) -> "Ref[V]":
        if digest == self.digest:
            return self
        return self.model_copy(update={"digest": digest, "generation": self.generation + 1})
