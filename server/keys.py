"""API keys: what each may do, held as hashes only.

A key is a random text, so a plain SHA-256 of it says nothing about it; `deltaworks keys new` makes one of 256 bits.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

Scope = Literal["inference", "admin"]
_HASHED = re.compile(r"sha256:[0-9a-f]{64}")


def hash_key(key: str) -> str:
    """ "sha256:" and 64 hexadecimal digits."""
    return f"sha256:{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()}"


def as_stored(written: str) -> str:
    """The hash of a key that an operator wrote down, as itself or as its hash already."""
    return written if _HASHED.fullmatch(written) else hash_key(written)


@dataclass(frozen=True)
class KeyLimits:
    """Of one key, None is no limit: rows in flight, prompt tokens that wait for a first output token, requests a minute."""

    max_concurrent: int | None = None
    max_queued_tokens: int | None = None
    requests_per_minute: int | None = None


@dataclass(frozen=True)
class Caller:
    """Who asks. `key_id` is the key's name, or the start of its hash, and None where no key is needed.

    `deltas`: names, or patterns of names with *, that the key may use; None = all.
    """

    key_id: str | None = None
    scopes: frozenset[Scope] = frozenset()
    deltas: tuple[str, ...] | None = None
    limits: KeyLimits = field(default_factory=KeyLimits)

    def may_use(self, delta: str) -> bool:
        return self.deltas is None or any(fnmatchcase(delta, pattern) for pattern in self.deltas)


ANYBODY = Caller()


@dataclass(frozen=True)
class Key:
    """`hash` as `hash_key` gives it: a client that knows the hash alone does not know the key."""

    hash: str
    caller: Caller


class Keys:
    """The configured keys. `inference_open`: no key is needed to infer."""

    def __init__(self, keys: Sequence[Key], inference_open: bool) -> None:
        self.inference_open = inference_open
        self._keys = tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def become(self, other: "Keys") -> None:
        """Hold the keys of `other` from the next request on."""
        self.inference_open, self._keys = other.inference_open, other._keys

    @property
    def any_admin(self) -> bool:
        return any("admin" in key.caller.scopes for key in self._keys)

    def find(self, key: str) -> Caller | None:
        """The owner of a key. Every known key is compared, whatever matched before: the time taken says nothing about them."""
        given, found = hash_key(key), None
        for known in self._keys:
            if hmac.compare_digest(given, known.hash):
                found = known.caller
        return found


def plain_keys(api: Iterable[str], admin: Iterable[str]) -> list[Key]:
    """Keys of the two lists, as hashes; an admin key may infer too."""
    admins = list(admin)
    found = [Key(one, Caller(_short(one), frozenset({"inference", "admin"}))) for one in admins]
    return [*found, *(Key(one, Caller(_short(one), frozenset({"inference"}))) for one in api if one not in admins)]


def _short(hashed: str) -> str:
    return hashed.removeprefix("sha256:")[:8]
