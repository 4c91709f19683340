"""The folder of artifacts: atomic, locked by one server, clean after a crash."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server.artifacts.backing import FileChanged, StoreError
from server.artifacts.folder import Folder
from server.artifacts.registry import DeltaRegistry
from server.artifacts.shelf import Shelf
from server.artifacts.store import BodyTooLarge, Store, backing


def recover(store: Store, base_id: str) -> None:
    shelf = Shelf(store)
    DeltaRegistry(shelf, base_id, "sha256:ba5e")
    shelf.recover()


def test_a_start_leaves_the_upload_of_another_server_alone_and_sweeps_a_dead_ones(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from server.artifacts.store import Store\n"
        "s = Store(Path(sys.argv[1])); s.open()\n"
        "with s.incoming(9) as incoming: incoming.write(b'half'); print(incoming.path, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        half = Path(other.stdout.readline().strip())
        store = Store(tmp_path)
        store.open()
        assert half.read_bytes() == b"half"
        other.send_signal(signal.SIGKILL)
        other.wait()
    store.open()
    assert not half.exists()


@pytest.mark.parametrize("path", ["gs://bucket/x", "https://host/x"])
def test_a_place_of_another_kind_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"neither a folder nor s3://BUCKET/PREFIX"):
        backing(path, tmp_path, None, None)


def test_unusable_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot use the store"):
        Store(tmp_path / "file").open()


def test_incoming_is_gone_unless_published(store: Store) -> None:
    with store.incoming(100) as incoming:
        incoming.write(b"abc")
    assert not incoming.path.exists()
    with store.incoming(100) as incoming:
        incoming.write(b"abc")
        incoming.sync()
        store.publish(incoming)
    assert store.object_path(incoming.digest).read_bytes() == b"abc"
    assert store.objects() == [incoming.digest]
    assert list((store.root / "incoming").iterdir()) == []


def test_incoming_stops_at_the_cap(store: Store) -> None:
    with store.incoming(5) as incoming:
        incoming.write(b"12345")
        with pytest.raises(BodyTooLarge):
            incoming.write(b"6")


def test_start_sweeps_what_a_crash_left(tmp_path: Path) -> None:
    root = tmp_path / "store"
    for folder in ("incoming", "objects", "refs/delta"):
        (root / folder).mkdir(parents=True)
    (root / "incoming" / "half").write_bytes(b"half")
    (root / "objects" / ("0" * 64)).write_bytes(b"never named")
    (root / "objects" / "notes.txt").write_bytes(b"not ours")
    (root / "refs/delta/red.tmp").write_bytes(b"half")
    store = Store(root)
    store.open()
    recover(store, "tiny-base")
    store.close()
    left = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert left == ["lock", "objects/notes.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "red.json is damaged"),
        (
            json.dumps({"name": "red", "digest": None, "generation": 0, "versions": [], "extra": 1}),
            "red.json is damaged",
        ),
    ],
)
def test_damaged_name_stops_the_start_and_deletes_nothing(store: Store, content: str, message: str) -> None:
    (store.root / "objects" / ("0" * 64)).write_bytes(b"perhaps needed")
    (store.root / "refs" / "delta").mkdir()
    (store.root / "refs" / "delta" / "red.json").write_text(content)
    with pytest.raises(StoreError, match=message):
        recover(store, "tiny-base")
    assert store.objects() == ["0" * 64]


def test_base_called_like_a_stored_delta_stops_the_start(store: Store) -> None:
    (store.root / "refs" / "delta").mkdir()
    ref = {"name": "red", "digest": None, "generation": 0, "versions": []}
    (store.root / "refs" / "delta" / "red.json").write_text(json.dumps(ref))
    with pytest.raises(StoreError, match="served_name"):
        recover(store, "red")


def test_a_ref_is_swapped_only_as_it_was_read(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.open()
    assert folder.read_ref("delta", "red") == (None, None)
    first = folder.swap_ref("delta", "red", b"1", None)
    second = folder.swap_ref("delta", "red", b"2", first)
    for change in (
        lambda: folder.swap_ref("delta", "red", b"3", None),
        lambda: folder.swap_ref("delta", "red", b"3", first),
        lambda: folder.remove_ref("delta", "red", first),
    ):
        with pytest.raises(FileChanged):
            change()
    assert folder.read_ref("delta", "red") == (b"2", second)
    folder.remove_ref("delta", "red", second)
    assert folder.refs() == {}
