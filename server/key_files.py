"""The keys of the settings, and the files that some of them come from: followed while the server runs."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable

from prometheus_client import Counter

from server.background import Background
from server.config import AuthSettings, SettingsError
from server.keys import Keys, plain_keys

_LOOK_S = 1.0

log = logging.getLogger("deltaworks.keys")

Signs = dict[str, tuple[int, int, int] | None]  # (inode, size, mtime) of every file, None of one that is not there


def keys_of(auth: AuthSettings) -> Keys:
    """Admin keys alone leave inference open; any other key that may infer closes it."""
    api, admin = ([key.get_secret_value() for key in keys] for keys in (auth.api_keys, auth.admin_keys))
    named = [entry.key() for entry in auth.keys]
    closed = bool(api) or any("inference" in key.caller.scopes for key in named)
    return Keys([*plain_keys(api, admin), *named], inference_open=not closed)


class KeyFiles(Background):
    """Reads the keys again when a file of theirs has changed, and looks the same twice, or when it is told to.

    Where they cannot be used the old ones stay, which is logged and counted. `reloads` has the label `outcome`: ok, error.
    """

    what = "following the key files"

    def __init__(
        self,
        keys: Keys,
        auth: AuthSettings,
        read: Callable[[], AuthSettings],
        reloads: Counter,
        interval_s: float = _LOOK_S,
    ) -> None:
        """`auth` is what `keys` are made of; `read` makes it anew from all that it came from, or raises SettingsError."""
        self._keys = keys
        self._auth = auth
        self._read = read
        self._reloads = reloads
        self._interval_s = interval_s
        self._told = asyncio.Event()
        self._read_as = self._seen = _look(auth)

    def reload(self) -> None:
        """Read them now, whether a file has changed or not."""
        self._told.set()

    async def run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), self._interval_s)
            told = self._told.is_set()
            self._told.clear()
            signs = await asyncio.to_thread(_look, self._auth)
            if told or self._seen == signs != self._read_as:
                await self._reload()
                self._read_as = signs
            self._seen = signs

    async def _reload(self) -> None:
        try:
            auth = await asyncio.to_thread(self._read)
            found = keys_of(auth)
            if found.inference_open and not self._keys.inference_open:
                raise SettingsError(
                    "no key is left that may infer, and without one inference would be open to everybody"
                )
        except SettingsError as error:
            self._reloads.labels("error").inc()
            log.error("the keys stay as they were: %s", error)
            return
        self._keys.become(found)
        self._auth = auth
        self._reloads.labels("ok").inc()
        log.info("the keys were read again", extra={"fields": {"keys": len(found)}})


def _look(auth: AuthSettings) -> Signs:
    """Blocking."""
    found: Signs = {}
    for file in (auth.api_key_file, auth.admin_key_file, auth.key_file):
        if file is not None:
            found[str(file)] = None
            with contextlib.suppress(OSError):
                stat = os.stat(file.expanduser())
                found[str(file)] = stat.st_ino, stat.st_size, stat.st_mtime_ns
    return found
