"""vLLM's calls for adapters: what a controller sends, repeats, and must not reach; and a folder that is watched."""

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from compressors.errors import CheckpointError
from server.config import Settings
from tests.server.conftest import ADMIN, API, CHECKS, House

pytestmark = pytest.mark.anyio

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def convert(adapter: Path, out: Path) -> None:
    """The delta of an adapter is its weights, with its rank behind."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    if config["peft_type"] != "LORA":
        raise CheckpointError(f"{adapter}/adapter_config.json: peft_type is not LORA")
    out.write_bytes((adapter / "adapter_model.safetensors").read_bytes() + str(config["r"]).encode())


def write_adapter(folder: Path, weights: bytes, rank: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "adapters"
    write_adapter(root / "red", b"red")
    (root / "plain.safetensors").write_bytes(b"a delta")
    (tmp_path / "secret.safetensors").write_bytes(b"not yours")
    write_adapter(tmp_path / "outside", b"not yours")
    return root


@pytest.fixture
async def served(build: Callable[..., House], settings: Settings, root: Path) -> AsyncGenerator[House, None]:
    store = settings.store.model_copy(update={"lora_root": root, "refresh_s": 0.02})
    house = build(settings=settings.model_copy(update={"store": store}), checks=replace(CHECKS, convert=convert))
    await house.gateway.start()
    yield house
    await house.gateway.stop()


@pytest.fixture
async def controller(served: House) -> AsyncGenerator[httpx.AsyncClient, None]:
    async with served.client(ADMIN) as client:
        yield client


async def load(client: httpx.AsyncClient, name: str, path: str, **more: Any) -> httpx.Response:
    return await client.post(LOAD, json={"lora_name": name, "lora_path": path, **more})


async def test_an_adapter_is_loaded_served_repeated_replaced_and_unloaded(
    controller: httpx.AsyncClient, served: House, root: Path
) -> None:
    for _ in range(2):  # a controller repeats itself
        answer = await load(controller, "red", str(root / "red"))
        assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'red' added successfully.")
        assert answer.headers["content-type"].startswith("text/plain")
    card = (await controller.get("/v1/admin/deltas/red")).json()
    assert (card["generation"], len(card["versions"])) == (1, 1)
    assert card["digest"] == hashlib.sha256(b"red4").hexdigest()
    ask = {"model": "red", "prompt": "a"}
    assert (await controller.post("/v1/completions", json=ask)).status_code == 200
    assert "red" in [model["id"] for model in (await controller.get("/v1/models")).json()["data"]]

    write_adapter(root / "red", b"other")
    refused = await load(controller, "red", "red")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "lora_adapter_already_loaded")
    stale = await load(controller, "red", "red", expected_generation=7)
    assert (stale.status_code, stale.json()["error"]["code"]) == (409, "delta_generation_mismatch")
    assert (await load(controller, "red", "red", load_inplace=True)).status_code == 200
    assert (await controller.get("/v1/admin/deltas/red")).json()["generation"] == 2

    gone = await controller.post(UNLOAD, json={"lora_name": "red"})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'red' removed successfully.")
    assert (await controller.post("/v1/completions", json=ask)).status_code == 404
    assert (await controller.post(UNLOAD, json={"lora_name": "red"})).status_code == 404


async def test_a_delta_file_is_taken_as_it_is(controller: httpx.AsyncClient) -> None:
    assert (await load(controller, "plain", "plain.safetensors")).status_code == 200
    card = (await controller.get("/v1/admin/deltas/plain")).json()
    assert card["digest"] == hashlib.sha256(b"a delta").hexdigest()


async def test_s2_nothing_outside_the_root_is_read(
    controller: httpx.AsyncClient, served: House, root: Path, tmp_path: Path
) -> None:
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (root / "half").mkdir()
    (root / "half" / "adapter_config.json").write_text("{}")
    (root / "half" / "adapter_model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe.safetensors")
    (root / "notes.txt").write_text("a text")
    (root / "empty").mkdir()
    forbidden = [
        str(tmp_path / "outside"),
        "../outside",
        "red/../../outside",
        "../adapters-elsewhere",
        "link",
        "link.safetensors",
        "half",
        "/etc/passwd",
        "/proc/self/mem",
        f"{root}/../secret.safetensors",
    ]
    missing = ["nothing", "RED", "red\u0000", "loop", "pipe.safetensors", "notes.txt", "empty", "x" * 4000, "~", "red "]
    for path in (*forbidden, *missing):
        answer = await load(controller, "stolen", path)
        expected = (403, "path_forbidden") if path in forbidden else (404, "lora_adapter_not_found")
        assert (answer.status_code, answer.json()["error"]["code"]) == expected, path
        assert str(tmp_path) not in answer.text
        assert len(answer.content) < 1000
    assert (await controller.get("/v1/admin/deltas")).json()["data"] == []
    assert served.store.objects() == []


async def test_r16_bad_adapters_are_refused_and_leave_nothing(
    controller: httpx.AsyncClient, served: House, root: Path
) -> None:
    write_adapter(root / "odd", b"odd")
    (root / "odd" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    (root / "broken.safetensors").write_bytes(b"broken header")
    (root / "foreign.safetensors").write_bytes(b"foreign base")
    (root / "large.safetensors").write_bytes(bytes(3_000_001))
    for name, path, status, code in (
        ("odd", "odd", 400, "delta_invalid"),
        ("broken", "broken.safetensors", 400, "delta_invalid"),
        ("foreign", "foreign.safetensors", 400, "delta_base_mismatch"),
        ("large", "large.safetensors", 413, "body_too_large"),
        ("a/b", "red", 400, "invalid_value"),
        ("tiny-base", "red", 400, "invalid_value"),
        ("", "red", 400, "invalid_value"),
    ):
        answer = await load(controller, name, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
        assert str(root) not in answer.text
    assert served.store.objects() == []
    assert list((served.store.root / "incoming").iterdir()) == []


async def test_the_calls_need_the_admin_key_and_the_setting(
    served: House, admin: httpx.AsyncClient, root: Path
) -> None:
    async with served.client(API) as user:
        assert (await load(user, "red", "red")).status_code == 403
    for path in (LOAD, UNLOAD):  # `admin` talks to a server without the setting
        answer = await admin.post(path, json={"lora_name": "red", "lora_path": "red"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "route_not_found")


async def test_a_watched_folder_is_published_and_followed(
    build: Callable[..., House], settings: Settings, root: Path
) -> None:
    (root / "bad name!.safetensors").write_bytes(b"1")
    (root / "broken.safetensors").write_bytes(b"broken header")
    store = settings.store.model_copy(update={"delta_dir": root, "refresh_s": 0.02})
    house = build(settings=settings.model_copy(update={"store": store}), checks=replace(CHECKS, convert=convert))
    await house.gateway.start()
    async with house.client(ADMIN) as admin:

        async def digests() -> dict[str, str]:
            cards = (await admin.get("/v1/admin/deltas")).json()["data"]
            return {card["name"]: card["digest"] for card in cards}

        async def until(**contents: bytes) -> None:
            async with asyncio.timeout(5):
                while await digests() != {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}:
                    await asyncio.sleep(0.01)

        await until(red=b"red4", plain=b"a delta")
        write_adapter(root / "red", b"better", rank=8)
        (root / "broken.safetensors").write_bytes(b"mended")
        await until(red=b"better8", plain=b"a delta", broken=b"mended")
        (root / "plain.safetensors").unlink()
        await asyncio.sleep(0.1)
        await until(red=b"better8", plain=b"a delta", broken=b"mended")
        assert (await admin.get("/v1/admin/deltas/red")).json()["generation"] == 2
    await house.gateway.stop()
