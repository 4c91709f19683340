"""What an admin does to a store, without HTTP: the operations at whose every step tests kill the server."""

import hashlib
from pathlib import Path

from server.artifacts.registry import DeltaRegistry
from server.artifacts.shelf import Shelf
from server.artifacts.store import Store
from server.artifacts.versions import DeltaVersion

OLD, NEW = b"the old version", b"the new version"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def version(content: bytes) -> DeltaVersion:
    return DeltaVersion(
        digest=digest(content),
        nbytes=len(content),
        created=1,
        method="impart",
        base_fingerprint="sha256:ba5e",
        ratio=32.0,
        checks=(),
    )


def start(store: Store) -> DeltaRegistry:
    store.open()
    shelf = Shelf(store)
    registry = DeltaRegistry(shelf, "tiny-base", "sha256:ba5e")
    shelf.recover()
    return registry


async def publish(store: Store, registry: DeltaRegistry, content: bytes) -> None:
    with store.incoming(1000) as incoming:
        incoming.write(content)
        await registry.publish("red", version(content), incoming, True, None)


async def move(store: Store, registry: DeltaRegistry, content: bytes) -> None:
    await registry.move("red", digest(content), registry.get("red").generation)


async def delete(store: Store, registry: DeltaRegistry, content: bytes) -> None:
    async with registry.retiring("red"):
        pass


OPERATIONS = {"publish": publish, "move": move, "delete": delete}


async def before(operation: str, store: Store, registry: DeltaRegistry) -> None:
    """What is there already: the name, pointing to OLD, and NEW as its other version where it has to be there."""
    if operation != "publish":
        await publish(store, registry, NEW)
    await publish(store, registry, OLD)


# What a server finds that starts when the operation is done.
AFTER = {
    "publish": [digest(NEW), [digest(OLD), digest(NEW)]],
    "move": [digest(NEW), [digest(NEW), digest(OLD)]],
    "delete": None,
}


def state(store: Store, registry: DeltaRegistry) -> list[object] | None:
    """What "red" points to and its versions, all of whose bytes are there; nothing else has a name."""
    assert [ref.name for ref in registry.refs()] in ([], ["red"])
    if not registry.refs():
        return None
    (ref,) = registry.refs()
    for known in ref.versions:
        store.fetch(known.digest)
        assert digest(Path(registry.path(known.digest)).read_bytes()) == known.digest
    return [ref.digest, [known.digest for known in ref.versions]]
