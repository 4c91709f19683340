"""A bucket: conditional writes that must be there, answers that are lost, objects that are spoilt, a store that is away."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.artifacts import bucket as module
from server.artifacts.backing import FileChanged, StoreError, StoreUnavailable
from server.artifacts.bucket import Bucket
from server.artifacts.store import Store
from tests.server.s3_server import BUCKET, S3Server, running_s3

pytestmark = pytest.mark.slow  # waits, processes and servers of its own


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with running_s3() as server:
        yield server


@pytest.fixture
def place(s3: S3Server, tmp_path: Path) -> Iterator[Bucket]:
    place = Bucket(f"s3://{BUCKET}/{tmp_path.name}", tmp_path / "cache", s3.url)
    place.open()
    yield place
    place.close()
    s3.before, s3.after = (lambda environ: None), (lambda environ, answer: None)


def put(store: Store, content: bytes) -> str:
    with store.incoming(100) as incoming:
        incoming.write(content)
        incoming.sync()
        store.publish(incoming)
    return incoming.digest


def test_a_ref_is_swapped_only_as_it_was_read(place: Bucket) -> None:
    assert place.read_ref("delta", "red") == (None, None)
    first = place.swap_ref("delta", "red", b"1", None)
    for stale in (None, '"' + "0" * 32 + '"'):
        with pytest.raises(FileChanged):
            place.swap_ref("delta", "red", b"2", stale)
    second = place.swap_ref("delta", "red", b"2", first)
    with pytest.raises(FileChanged):
        place.remove_ref("delta", "red", first)
    assert place.read_ref("delta", "red") == (b"2", second)
    assert {key: entry.stamp for key, entry in place.refs().items()} == {("delta", "red"): second}
    place.remove_ref("delta", "red", second)
    content, removed = place.read_ref("delta", "red")
    assert (content, place.refs()) == (None, {})
    with pytest.raises(FileChanged):
        place.swap_ref("delta", "red", b"3", None)
    place.swap_ref("delta", "red", b"3", removed)


@pytest.mark.parametrize("ignored", ["HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH"])
def test_a_store_that_ignores_a_condition_is_refused(s3: S3Server, place: Bucket, tmp_path: Path, ignored: str) -> None:
    s3.before = lambda environ: environ.pop(ignored, None)
    with pytest.raises(StoreError, match="ignores conditional writes"):
        Bucket(f"s3://{BUCKET}/other", tmp_path / "cache", s3.url).open()
    assert not s3.client().list_objects_v2(Bucket=BUCKET, Prefix="other").get("Contents")


def test_a_bucket_that_is_not_there_is_a_clear_error(s3: S3Server, place: Bucket, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot use the store s3://nowhere/x"):
        Bucket("s3://nowhere/x", tmp_path / "cache", s3.url).open()


def test_a_change_whose_answer_was_lost_is_ours(s3: S3Server, place: Bucket) -> None:
    """The client sends it again and is told that the condition fails: by what it has itself written."""
    lost: list[str] = []

    def lose(environ: dict[str, Any], answer: Any) -> str | None:
        if environ["REQUEST_METHOD"] == "PUT" and not lost:
            lost.append(environ["PATH_INFO"])
            return "500 Internal Server Error"
        return None

    s3.after = lose
    tag = place.swap_ref("delta", "red", b"1", None)
    assert len(lost) == 1
    assert place.read_ref("delta", "red") == (b"1", tag)


def test_objects_come_through_the_cache_and_are_checked(s3: S3Server, place: Bucket, tmp_path: Path) -> None:
    digest = put(Store(place), b"some bytes")
    other = Bucket(place.place, tmp_path / "cache", s3.url)
    other.open()
    assert (place.root.name, other.root.name) == ("0", "1")  # each server of a machine has its own
    other.fetch_object(digest)
    assert (other.root / "objects" / digest).read_bytes() == b"some bytes"
    other.forget_object(digest)
    key = f"{tmp_path.name}/objects/{digest}"
    s3.client().put_object(Bucket=BUCKET, Key=key, Body=b"same bytes")
    with pytest.raises(StoreUnavailable, match="digest"):
        other.fetch_object(digest)
    assert list((other.root / "incoming").iterdir()) == list((other.root / "objects").iterdir()) == []
    s3.client().delete_object(Bucket=BUCKET, Key=key)
    with pytest.raises(StoreUnavailable):
        other.fetch_object(digest)
    other.close()


def test_only_an_object_older_than_any_upload_is_dropped(
    s3: S3Server, place: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(place)
    digest = put(store, b"1")
    store.keep_only([])
    assert store.objects() == [digest]
    monkeypatch.setattr(module, "UPLOAD_S", -1.0)
    store.keep_only([digest])
    assert store.objects() == [digest]
    store.drop_object(digest)
    assert store.objects() == []


def test_the_cache_drops_what_was_asked_for_longest_ago(s3: S3Server, place: Bucket, tmp_path: Path) -> None:
    digests = [put(Store(place), bytes([65 + n]) * 10) for n in range(4)]
    small = Bucket(place.place, tmp_path / "small", s3.url, max_cache_bytes=25)
    small.open()
    for age_s, digest in zip((300, 200, 100), digests[:3], strict=True):
        small.fetch_object(digest)
        os.utime(small.root / "objects" / digest, (time.time() - age_s,) * 2)
    small.fetch_object(digests[3])
    assert {path.name for path in (small.root / "objects").iterdir()} == set(digests[2:])
    small.close()


def test_a_store_that_is_away_is_named_as_such(s3: S3Server, place: Bucket) -> None:
    s3.after = lambda environ, answer: "403 Forbidden"
    for call in (place.refs, place.objects, lambda: place.read_ref("delta", "red")):
        with pytest.raises(StoreUnavailable, match="the artifact store does not answer as it should"):
            call()
    with pytest.raises(StoreUnavailable):
        place.swap_ref("delta", "red", b"1", None)


def test_a_listing_that_meets_the_first_file_is_a_listing(s3: S3Server, place: Bucket) -> None:
    """Nothing was there when the files were listed, and something is when their folder is looked up."""
    seen: list[str] = []

    def appear(environ: dict[str, Any], answer: Any) -> str | None:
        if "refs%2F" in environ["QUERY_STRING"] or "refs/" in environ["QUERY_STRING"]:
            seen.append(environ["QUERY_STRING"])
            if len(seen) == 1:
                s3.client().put_object(
                    Bucket=BUCKET, Key=place.place.removeprefix(f"s3://{BUCKET}/") + "/refs/delta/red.json"
                )
        return None

    s3.after = appear
    assert set(place.refs()) <= {("delta", "red")}
    assert len(seen) > 1
