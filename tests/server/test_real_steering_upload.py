"""Uploads through the real checks: true profiles and SAEs are taken and described, every wrong one leaves nothing."""

import hashlib
import json
import pickle
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from server.serve import checks_for
from steering.conflict import Probe
from steering.formats import pack_sae
from steering.header import DirectionHeader, LayerHeader, ProbeHeader, ProfileHeader
from steering.latents import LatentRows
from steering.profile import LayerSelection, write_profile
from steering.sae import SAE, Hook

pytestmark = pytest.mark.anyio

D_IN, LAYERS, D_SAE = 8, 4, 32


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_file({"model.layers.0.mlp.up_proj.weight": random(D_IN, D_IN)}, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": D_IN}
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    return folder


def selection(d_in: int) -> LayerSelection:
    def rows(count: int, first: int) -> LatentRows:
        ids = first + torch.arange(count)
        return LatentRows(ids, random(count, d_in), random(count), torch.zeros(count), random(count, d_in))

    return LayerSelection(rows(3, 0), rows(2, 10), random(3).abs(), random(2).abs())


def profile(folder: Path, fingerprint: str, d_in: int = D_IN, layer: int = 2) -> bytes:
    header = ProfileHeader(
        base_fingerprint=fingerprint,
        model_name="tiny",
        template_sha256="",
        d_in=d_in,
        directions={"use_context": DirectionHeader(layers=(layer,), strength=1.5)},
        layers={layer: LayerHeader(sae_sha256="0" * 64, n_context=3, n_parameter=2)},
        probe=ProbeHeader(layer=1, threshold=0.4, auroc=0.9, accuracy=0.8, n=50),
    )
    probe = Probe(1, random(d_in), random(1), random(d_in), random(d_in).abs() + 1)
    path = folder / "made.profile"
    write_profile(path, header, {layer: selection(d_in)}, probe)
    return path.read_bytes()


def sae(
    folder: Path, fingerprint: str | None, d_in: int = D_IN, layer: int = 2, maxima: torch.Tensor | None = None
) -> bytes:
    path = folder / "made.sae"
    made = SAE(
        w_enc=random(d_in, D_SAE),
        b_enc=random(D_SAE),
        w_dec=random(D_SAE, d_in),
        b_dec=random(d_in),
        architecture="topk",
        k=4,
        maxima=maxima,
        hook=Hook(layer),
        model_name="tiny",
        metadata={"base_fingerprint": fingerprint},
    )
    pack_sae(made, path)
    return path.read_bytes()


MAKERS: dict[str, Callable[..., bytes]] = {"profiles": profile, "saes": sae}


def with_tensor(data: bytes, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> bytes:
    """The same file with its tensors changed and its header as it was."""
    path = folder / "changed"
    path.write_bytes(data)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is no mapping
    change(tensors)
    save_file(tensors, path, metadata=metadata)
    return path.read_bytes()


def first_float(tensors: dict[str, torch.Tensor], value: float) -> None:
    name = min(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel())
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] = value


@pytest.fixture
async def house(base: Path, build: Callable[..., Any]) -> AsyncGenerator[Any, None]:
    fingerprint, checks = checks_for(base)
    house = build(checks=checks, fingerprint=fingerprint)
    await house.gateway.start()
    yield house
    await house.gateway.stop()


@pytest.fixture
def send(admin: httpx.AsyncClient, house: Any) -> Callable[..., Any]:
    """Upload bytes under their true digest; after a refusal the store must be as empty as before."""

    async def send(plural: str, content: bytes) -> httpx.Response:
        form = {"name": "one", "sha256": hashlib.sha256(content).hexdigest()}
        response = await admin.post(f"/v1/admin/{plural}", data=form, files={"file": content})
        if response.status_code != 201:
            assert [path.name for path in house.store.root.rglob("*") if path.is_file()] == ["lock"]
        return response

    return send


async def test_true_profile_is_described(send: Any, base: Path, tmp_path: Path) -> None:
    fingerprint, _ = checks_for(base)
    response = await send("profiles", profile(tmp_path, fingerprint))
    assert response.status_code == 201, response.text
    (version,) = response.json()["versions"]
    assert version["directions"] == {"use_context": {"layers": [2], "strength": 1.5}}
    assert version["latents"] == {"2": 5}
    assert version["probe"] == {"layer": 1, "threshold": 0.4, "auroc": 0.9}
    assert (version["base_fingerprint"], version["model_name"]) == (fingerprint, "tiny")


async def test_true_sae_is_described(send: Any, base: Path, tmp_path: Path) -> None:
    fingerprint, _ = checks_for(base)
    response = await send("saes", sae(tmp_path, fingerprint))
    assert response.status_code == 201, response.text
    (version,) = response.json()["versions"]
    shape = (version["architecture"], version["layer"], version["d_in"], version["d_sae"])
    assert shape == ("topk", 2, D_IN, D_SAE)
    assert version["has_maxima"] is False


CODES = {"profiles": {"profile_invalid"}, "saes": {"sae_invalid", "sae_mismatch"}}


@pytest.mark.parametrize("plural", ["profiles", "saes"])
@pytest.mark.parametrize(
    "spoil", ["model", "width", "layer", "nan", "inf", "shape", "missing", "surplus", "truncated", "pickle", "empty"]
)
async def test_wrong_file_is_a_clear_400(send: Any, base: Path, tmp_path: Path, plural: str, spoil: str) -> None:
    fingerprint, _ = checks_for(base)
    make = MAKERS[plural]
    good = make(tmp_path, fingerprint)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[min(tensors)]

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[min(tensors)] = torch.cat([tensors[min(tensors)]] * 2)

    makers: dict[str, Callable[[], bytes]] = {
        "model": lambda: make(tmp_path, "sha256:another"),
        "width": lambda: make(tmp_path, fingerprint, d_in=D_IN * 2),
        "layer": lambda: make(tmp_path, fingerprint, layer=LAYERS),
        "nan": lambda: with_tensor(good, tmp_path, lambda tensors: first_float(tensors, float("nan"))),
        "inf": lambda: with_tensor(good, tmp_path, lambda tensors: first_float(tensors, float("inf"))),
        "shape": lambda: with_tensor(good, tmp_path, grow),
        "missing": lambda: with_tensor(good, tmp_path, drop),
        "surplus": lambda: with_tensor(good, tmp_path, lambda tensors: tensors.update(code=torch.ones(1))),
        "truncated": lambda: good[:-20],
        "pickle": lambda: pickle.dumps({"w_enc": [1.0]}),
        "empty": lambda: b"",
    }
    response = await send(plural, makers[spoil]())
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["code"] in CODES[plural]
    assert "incoming" not in error["message"]


async def test_each_kind_refuses_the_other(send: Any, base: Path, tmp_path: Path) -> None:
    fingerprint, _ = checks_for(base)
    for plural, content in (
        ("profiles", sae(tmp_path, fingerprint)),
        ("saes", profile(tmp_path, fingerprint)),
        ("deltas", profile(tmp_path, fingerprint)),
    ):
        response = await send(plural, content)
        assert response.status_code == 400, response.text


async def test_uploaded_files_steer(send: Any, client: httpx.AsyncClient, base: Path, tmp_path: Path) -> None:
    fingerprint, _ = checks_for(base)
    await send("profiles", profile(tmp_path, fingerprint))
    await send("saes", sae(tmp_path, fingerprint))
    last_feature = {"sae": "one", "features": [{"id": D_SAE - 1, "op": "set", "value": 2}]}
    for steering in ({"profile": "one", "direction": "use_context"}, {"edits": [last_feature]}):
        body = {"model": "tiny-base", "prompt": "abc", "steering": steering}
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        assert response.json()["gateway"]["steering"]["applied"] is True
        assert response.json()["gateway"]["warnings"] == []
    body["steering"] = {"profile": "one", "direction": "use_parameter"}
    error = (await client.post("/v1/completions", json=body)).json()["error"]
    message = "the profile has no such direction; it has: use_context"
    assert (error["param"], error["message"]) == ("steering.direction", message)


async def test_values_as_multiples_of_the_recorded_maximum(
    send: Any, client: httpx.AsyncClient, house: Any, base: Path, tmp_path: Path
) -> None:
    """The engine gets plain numbers, so that the same edit said either way is one edit."""
    fingerprint, _ = checks_for(base)
    maxima = torch.arange(D_SAE) * 0.5
    maxima[9] = 1e6
    response = await send("saes", sae(tmp_path, fingerprint, maxima=maxima))
    assert response.json()["versions"][0]["has_maxima"] is True

    async def ask(*features: Any) -> httpx.Response:
        steering = {"edits": [{"sae": "one", "features": list(features)}]}
        return await client.post("/v1/completions", json={"model": "tiny-base", "prompt": "abc", "steering": steering})

    relative = await ask(
        {"id": 31, "op": "raise", "value": {"x_max": 2}},
        {"id": 3, "op": "ablate"},
        {"id": 4, "op": "add", "value": {"x_max": -0.25}},
        {"id": 5, "op": "set", "value": 7},
        {"id": 6, "op": "lower", "value": {"x_max": 0}},
    )
    assert relative.status_code == 200, relative.text
    features = json.loads(house.engine.asked[-1].spec)["tables"][0]["features"]
    assert [(found["id"], found["op"], found["value"]) for found in features] == [
        (3, "ablate", 0.0),
        (4, "add", -0.5),
        (5, "set", 7.0),
        (6, "lower", 0.0),
        (31, "raise", 31.0),
    ]
    plain = await ask(
        *({key: found[key] for key in ("id", "op", "value")[: 2 + (found["id"] != 3)]} for found in features)
    )
    assert plain.json()["gateway"]["steering"]["fingerprint"] == relative.json()["gateway"]["steering"]["fingerprint"]
    for latent, factor, words in (
        (0, 2, "feature 0 never fired"),
        (9, 2, "2 times the maximum 1e+06 is over the limit"),
    ):
        refused = await ask({"id": 1, "op": "set", "value": 1}, {"id": latent, "op": "set", "value": {"x_max": factor}})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "steering.edits.0.features.1.value")
        assert words in error["message"]
    outside = await ask({"id": D_SAE, "op": "set", "value": {"x_max": 1}})
    assert outside.json()["error"]["param"] == "steering.edits.0.features.0.id"


async def test_names_of_earlier_servers_have_no_maxima(
    send: Any, client: httpx.AsyncClient, house: Any, build: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    fingerprint, checks = checks_for(base)
    await send("saes", sae(tmp_path, fingerprint))
    ref = house.store.root / "refs" / "sae" / "one.json"
    found = json.loads(ref.read_text())
    del found["versions"][0]["has_maxima"]
    ref.write_text(json.dumps(found))
    reborn = build(checks=checks, fingerprint=fingerprint)
    assert (await reborn.context.saes.get("one")).versions[0].has_maxima is False
