"""Models small enough to serve in seconds, fine-tunes of them, and the oracle: transformers with the delta merged in."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from compressors.base import default_base
from compressors.compress import compress
from compressors.impart import ImPartConfig
from server.child import Child, child_server
from server.engine.base import EngineDelta
from server.own_tokenizers import OwnTokenizers, loader
from server.prompt import HuggingFaceTokenizer
from tests.engine.bed import Runner, engine_settings, running

BLOCK_BYTES = 128 * 3 * 2 * 2 * 32 * 4  # tokens, layers, K and V, heads, width, fp32
STALL_S = 20  # of the shared server: more than a step takes on a busy core
RESERVED = 2048  # so many that tokens drawn from a flat distribution would be among them
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 49152,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 2,
}


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with the default base's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=0.08))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(default_base(progress=False) / name, folder)
    return folder


def fine_tune(base: Path, folder: Path, seed: int) -> Path:
    """Every projection moved by a spiked random matrix, about a tenth of its norm, as fine-tuning would."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and ("self_attn" in name or "mlp" in name):
                spikes = torch.randn(weight.shape[0], 6, generator=generator) @ torch.randn(
                    6, weight.shape[1], generator=generator
                )
                noise = torch.randn(weight.shape, generator=generator)
                change = spikes / spikes.norm() + 0.5 * noise / noise.norm()
                weight += 0.35 * weight.norm() * change
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_deltas(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[EngineDelta]:
    """Three artifacts of the tiny model: int8, fp16 and bf16 values."""
    folder = tmp_path_factory.mktemp("deltas")
    deltas = []
    for i, value_dtype in enumerate(("int8", "fp16", "bf16")):
        tuned = fine_tune(tiny_base, folder / f"tuned-{i}", seed=10 + i)
        path = folder / f"delta-{i}.safetensors"
        compress(tiny_base, tuned, path, ImPartConfig(ratio=8.0, value_dtype=value_dtype, seed=i))
        deltas.append(EngineDelta(digest=f"{i}" * 64, path=str(path)))
    return deltas


@pytest.fixture(scope="session")
def tiny_engine(tiny_base: Path, tiny_deltas: list[EngineDelta]) -> Iterator[Runner]:
    """One engine with all three deltas resident. It heeds priorities; where all are equal that changes nothing."""
    with running(tiny_base, tiny_deltas, scheduling_policy="priority") as runner:
        yield runner


@pytest.fixture(scope="session")
def chunked_engine(tiny_base: Path, tiny_deltas: list[EngineDelta]) -> Iterator[Runner]:
    """Chunks of 48 tokens, two threads, and so small a cache that rows which grow are thrown out and computed again."""
    changes = {"max_num_batched_tokens": 48, "threads": 2, "kv_cache_bytes": 7 * BLOCK_BYTES}
    with running(tiny_base, tiny_deltas, **changes) as runner:
        yield runner


@pytest.fixture(scope="session")
def torch_engine(tiny_base: Path, tiny_deltas: list[EngineDelta]) -> Iterator[Runner]:
    """Deltas in torch's form, and too small a cache for all rows here too."""
    with running(tiny_base, tiny_deltas, kernel="torch", kv_cache_bytes=15 * BLOCK_BYTES) as runner:
        yield runner


@pytest.fixture(scope="session")
def base_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """The embedded base behind HTTP, without a delta. One thread: it shares the machine with the tests beside it."""
    arguments = ["--dtype", "float32", "--max-model-len", "1024"]
    with ExitStack() as running_server:
        with pytest.MonkeyPatch.context() as environment:  # the child's alone
            environment.setenv("DELTAWORKS__GATE__TIMEOUT_MS", "120000")
            environment.setenv("DELTAWORKS__ENGINE__THREADS", "1")
            environment.setenv("DELTAWORKS__ENGINE__RESTART__STALL_S", str(STALL_S))
            child = running_server.enter_context(child_server(tmp_path_factory.mktemp("server"), arguments))
        child.wait_ready(300)
        yield child


@dataclass(frozen=True)
class World:
    """A running engine with a reserve, its base, a delta that trained everything and one that trained the projections."""

    runner: Runner
    base: Path
    whole: EngineDelta
    projections: EngineDelta
    own: OwnTokenizers[HuggingFaceTokenizer]


def train(base: Path, folder: Path, lr: float, steps: int = 4) -> Path:
    """Real optimiser steps on every parameter."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        ids = torch.randint(model.config.vocab_size, (2, 24), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def train_delta(base: Path, tuned: Path, path: Path, digest: str, **changes: object) -> EngineDelta:
    compress(base, tuned, path, ImPartConfig(ratio=8.0, **changes))
    return EngineDelta(digest=digest * 64, path=str(path))


@pytest.fixture(scope="session")
def untied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2: biases in its linears and a head of its own."""
    folder = tmp_path_factory.mktemp("untied") / "tiny-qwen2"
    torch.manual_seed(1)
    config = {key: value for key, value in TINY.items() if key != "head_dim"} | {"tie_word_embeddings": False}
    model = Qwen2ForCausalLM(Qwen2Config(**config, initializer_range=0.08, use_sliding_window=False))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value += 0.1 * torch.randn(value.shape)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(default_base(progress=False) / name, folder)
    return folder


@pytest.fixture(scope="session", params=["tied", "untied"])
def world(request, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = tiny_base if request.param == "tied" else request.getfixturevalue("untied_base")
    folder = tmp_path_factory.mktemp(f"whole-{request.param}")
    rows_dtype = "int8" if request.param == "tied" else "fp16"
    whole = train_delta(base, train(base, folder / "whole", 0.02), folder / "w.safetensors", "a", rows_dtype=rows_dtype)
    projections = train_delta(base, fine_tune(base, folder / "tuned", 10), folder / "p.safetensors", "b")
    own = OwnTokenizers(loader(base), 4)
    runner = Runner(base, engine_settings(reserved_tokens=RESERVED), lambda delta: own.of(delta).loaded)
    try:
        runner.load(whole)
        runner.load(projections)
        yield World(runner, base, whole, projections, own)
    finally:
        runner.stop()
