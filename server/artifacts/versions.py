"""What is durable about artifacts: the uploaded versions of each kind, and the names that point to them."""

import re
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field


def _is_no_text(value: object) -> bool:
    return value == ""


class Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Version(Facts):
    """One uploaded artifact under a name."""

    digest: str
    nbytes: int
    created: int  # unix seconds
    description: str = Field(default="", exclude_if=_is_no_text)


class DeltaVersion(Version):
    """`chat_template` "", `stop_ids` () and `tokenizer` "" = the base's; `added_tokens` lie behind the base's vocabulary."""

    method: str
    base_fingerprint: str
    ratio: float | None
    checks: tuple[str, ...]
    chat_template: str = ""
    stop_ids: tuple[int, ...] = ()
    added_tokens: int = 0
    tokenizer: str = ""


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


_MAX_HISTORY = 1000  # moves of a name that are remembered
_GENERATION = re.compile(r"[0-9]{1,11}")
_DIGEST_START = re.compile(r"[0-9a-f]{12,64}")


def _is_false(value: object) -> bool:
    return value is False


def _is_empty(value: object) -> bool:
    return value == ()


class Ref(Facts, Generic[V]):
    """A name: `digest` is what it points to (None = nothing yet), `generation` counts the moves.

    `pinned`: what it points to is to stay resident. `history`: what it pointed to in the last generations, this one's last;
    names that have never moved since it is kept have none.
    """

    format: Literal[1] = 1
    name: str
    digest: str | None
    generation: int
    versions: tuple[V, ...]
    pinned: bool = Field(default=False, exclude_if=_is_false)
    history: tuple[str, ...] = Field(default=(), exclude_if=_is_empty)

    def version(self, digest: str) -> V | None:
        return next((version for version in self.versions if version.digest == digest), None)

    def active(self) -> V | None:
        return self.version(self.digest) if self.digest else None

    def pointing_to(self, digest: str) -> "Ref[V]":
        if digest == self.digest:
            return self
        history = (*self._history(), digest)[-_MAX_HISTORY:]
        return self.model_copy(update={"digest": digest, "generation": self.generation + 1, "history": history})

    def at(self, wanted: str) -> V | None:
        """The version of a generation, or of the digest that begins so: 12 digits or more, and no other begins so."""
        if _GENERATION.fullmatch(wanted):
            back = self.generation - int(wanted)
            history = self._history()
            return self.version(history[-1 - back]) if 0 <= back < len(history) else None
        if not _DIGEST_START.fullmatch(wanted):
            return None
        found = [version for version in self.versions if version.digest.startswith(wanted)]
        return found[0] if len(found) == 1 else None

    def label(self, digest: str) -> str:
        """What `at` takes for that digest: the last generation that pointed to it, or how it begins."""
        history = self._history()
        back = next((back for back, old in enumerate(reversed(history)) if old == digest), None)
        return digest[:12] if back is None else str(self.generation - back)

    def _history(self) -> tuple[str, ...]:
        return self.history or ((self.digest,) if self.digest else ())
