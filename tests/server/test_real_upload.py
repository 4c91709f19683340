"""Uploads through the real verification: a true delta is taken, every damaged one is refused and leaves nothing."""

import hashlib
import io
import json
import pickle
import struct
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from compressors.compress import compress
from compressors.impart import ImPartConfig
from server.artifacts.reserve import ReserveExceeded
from server.artifacts.store import Incoming
from server.serve import checks_for

pytestmark = pytest.mark.anyio

WEIGHT = "model.layers.0.mlp.up_proj.weight"


def write_model(folder: Path, seed: int, scale: float = 0.0) -> Path:
    tensors = {
        name: torch.randn(48, 48, generator=torch.Generator().manual_seed(seed))
        for name in (WEIGHT, "model.layers.0.mlp.gate_proj.weight")
    }
    for weight in tensors.values():
        weight += scale * torch.randn(48, 48, generator=torch.Generator().manual_seed(99))
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, other (same shapes, other weights), and a delta of each."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("other", 1)):
        base, tuned = write_model(root / name, seed), write_model(root / f"{name}-tuned", seed, scale=0.1)
        compress(base, tuned, root / f"{name}.delta", ImPartConfig(ratio=4.0))
    return root


@pytest.fixture
async def send(folder: Path, build: Callable[..., Any]) -> AsyncGenerator[Callable[[bytes], Any], None]:
    """Upload bytes under their true digest; after a refusal the store must be as empty as before."""
    _, checks = checks_for(folder / "base")
    house = build(checks=checks)
    await house.gateway.start()
    async with house.client({"authorization": "Bearer admin-key"}) as admin:

        async def send(content: bytes) -> httpx.Response:
            form = {"name": "red", "sha256": hashlib.sha256(content).hexdigest()}
            response = await admin.post("/v1/admin/deltas", data=form, files={"file": content})
            if response.status_code != 201:
                assert [path.name for path in house.store.root.rglob("*") if path.is_file()] == ["lock"]
            return response

        yield send
    await house.gateway.stop()


async def test_true_delta_is_taken_and_described(send: Any, folder: Path) -> None:
    response = await send((folder / "base.delta").read_bytes())
    assert response.status_code == 201, response.text
    (version,) = response.json()["versions"]
    assert (version["method"], version["ratio"]) == ("impart", 4.0)
    assert version["base_fingerprint"] == checks_for(folder / "base")[0]
    assert {"base", "shapes", "digests", "finite"} <= set(version["checks"])


async def test_r15_delta_of_another_base_with_the_same_shapes(send: Any, folder: Path) -> None:
    response = await send((folder / "other.delta").read_bytes())
    assert (response.status_code, response.json()["error"]["code"]) == (400, "delta_base_mismatch")


def truncated(data: bytes) -> bytes:
    return data[:-100]


def flipped(data: bytes) -> bytes:
    return data[:-7] + bytes([data[-7] ^ 0x10]) + data[-6:]


def pickled(data: bytes) -> bytes:
    return pickle.dumps({"weight": [1.0, 2.0]})


def with_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def rewrite(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        manifest = json.loads(header["__metadata__"]["deltaworks"])
        change(manifest)
        header["__metadata__"]["deltaworks"] = json.dumps(manifest)
        encoded = json.dumps(header).encode()
        return struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]

    return rewrite


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        flipped,
        pickled,
        lambda data: b"",
        lambda data: data[:5],
        with_manifest(lambda manifest: manifest.update(format_version=99)),
        with_manifest(lambda manifest: manifest.update(method="magic")),
        with_manifest(lambda manifest: manifest["tensors"].pop(WEIGHT)),
        with_manifest(lambda manifest: manifest.update(surprise=1)),
    ],
)
async def test_r16_damaged_delta_is_refused(send: Any, folder: Path, damage: Callable[[bytes], bytes]) -> None:
    response = await send(damage((folder / "base.delta").read_bytes()))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "delta_invalid")
    assert str(folder) not in error["message"]
    assert "incoming" not in error["message"]


def test_the_version_keeps_what_is_not_the_bases(folder: Path, tmp_path: Path) -> None:
    base = folder / "base"
    tuned = write_model(tmp_path / "tuned", 0, scale=0.1)
    config = json.loads((tuned / "config.json").read_text()) | {"eos_token_id": [3, 4]}
    (tuned / "config.json").write_text(json.dumps(config))
    (tuned / "chat_template.jinja").write_text("own")
    compress(base, tuned, tmp_path / "d.safetensors", ImPartConfig(ratio=4.0))
    _, checks = checks_for(base)
    for path, template, stop_ids in (
        (tmp_path / "d.safetensors", "own", (3, 4)),
        (folder / "base.delta", "", ()),
    ):
        version = checks.delta(Incoming(path, io.BytesIO(), 0))
        assert (version.chat_template, version.stop_ids) == (template, stop_ids)


def test_added_tokens_that_are_not_reserved_are_refused_at_the_door(tmp_path: Path) -> None:
    table = torch.ones(8, 48)
    for name, rows in (("base", table), ("tuned", torch.cat([table, table[:2]]))):
        write_model(tmp_path / name, 0)
        tensors = load_file(tmp_path / name / "model.safetensors") | {"model.embed_tokens.weight": rows}
        save_file(tensors, tmp_path / name / "model.safetensors")
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "d.safetensors", ImPartConfig(ratio=4.0))
    _, checks = checks_for(tmp_path / "base")
    with pytest.raises(ReserveExceeded, match=r"adds 2 tokens.*engine\.reserved_tokens is 0.*at least 2"):
        checks.delta(Incoming(tmp_path / "d.safetensors", io.BytesIO(), 0))
    _, checks = checks_for(tmp_path / "base", reserved_tokens=2)
    assert checks.delta(Incoming(tmp_path / "d.safetensors", io.BytesIO(), 0)).added_tokens == 2
