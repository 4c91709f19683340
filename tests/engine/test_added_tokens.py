"""Added tokens on the real engine: served equals the oracle, and nobody else's. On the worlds of whole fine-tunes."""

import asyncio
import hashlib
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressors.compress import compress
from compressors.decompress import decompress
from compressors.impart import ImPartConfig
from server.app import create_app
from server.artifacts.combination import combination
from server.artifacts.store import Store
from server.cli import main
from server.config import Settings
from server.core import Sampling
from server.engine.base import EngineDelta, EngineLoadError, WeightedDelta
from server.engine.vllm import VLLMEngine
from server.prompt import HuggingFaceTokenizer
from server.serve import checks_for
from server.wiring import Base, wire
from tests.engine.bed import Row
from tests.engine.conftest import RESERVED, World, train
from tests.engine.test_truths import PROMPTS, assert_same, merged, oracle

pytestmark = pytest.mark.engine

KNOWN = 49152
SPECIAL, WORD = ("<|delta|>", "<|works|>"), "windmill"
TEMPLATE = "{% for m in messages %}<|delta|>{{ m.content }}<|works|>{% endfor %}windmill"


@dataclass(frozen=True)
class Tuned:
    """A fine-tune with added tokens, its delta, and the oracle."""

    folder: Path
    delta: EngineDelta
    model: torch.nn.Module


@pytest.fixture(scope="module")
def tuned(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuned]:
    """Three added tokens and a tokenizer, resident."""
    folder = grown(world.base, tmp_path_factory.mktemp("added") / "tuned", 5)
    give_tokenizer(world.base, folder)
    with loaded(world, folder) as delta:
        yield Tuned(folder, delta, whole_oracle(world, delta))


def grown(base: Path, folder: Path, seed: int, added: int = 3, steps: int = 2) -> Path:
    """Every parameter trained, and tokens added whose rows are long enough to be said often."""
    train(base, folder, 0.02, steps)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(KNOWN + added, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            usual = table[:KNOWN].norm(dim=1).mean() / table.shape[1] ** 0.5
            table[KNOWN:] = 6 * usual * torch.randn(added, table.shape[1], generator=generator)
    model.save_pretrained(folder)
    return folder


def give_tokenizer(base: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.add_tokens([WORD])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


@contextmanager
def loaded(world: World, folder: Path) -> Iterator[EngineDelta]:
    path = folder.with_suffix(".safetensors")
    compress(world.base, folder, path, ImPartConfig(ratio=8.0))
    delta = EngineDelta(digest=hashlib.sha256(str(path).encode()).hexdigest(), path=str(path))
    world.runner.load(delta)
    try:
        yield delta
    finally:
        world.runner.unload(delta)


def whole_oracle(world: World, delta: EngineDelta) -> torch.nn.Module:
    folder = Path(delta.path).with_suffix(".whole")
    decompress(Path(delta.path), world.base, folder, "fp32")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_added_tokens_are_read_and_said_as_by_the_oracle_and_by_nobody_else(world: World, tuned: Tuned, tmp_path: Path):
    """Four deltas and the base in one batch; two of them add tokens under the same ids."""
    first = tuned.delta
    with loaded(world, grown(world.base, tmp_path / "fewer", 6, added=1)) as second:
        rows = [Row(prompt, who) for prompt in PROMPTS for who in (first, None, second, world.whole, world.projections)]
        rows += [Row((KNOWN + 2, 77, KNOWN, 4021, KNOWN + 1), first), Row((5, KNOWN, 900), second)]
        answers = dict(zip(rows, world.runner.answer(rows, 12), strict=True))
        models = {who: merged(world.base, who) for who in (None, world.whole, world.projections)}
        models |= {first: tuned.model, second: whole_oracle(world, second)}
    for row in rows:
        assert_same(answers[row], oracle(models[row.delta], row.prompt, 12))
    said = {who: {token for row in rows if row.delta == who for token in answers[row].tokens} for who in models}
    assert {KNOWN, KNOWN + 1, KNOWN + 2} & said[first]
    assert KNOWN in said[second]


def test_base_rows_are_bit_identical_beside_added_tokens_and_without(world: World, tuned: Tuned):
    rows = [Row((*prompt, 8)) for prompt in PROMPTS]
    beside = world.runner.answer([*rows, Row((*PROMPTS[0], KNOWN), tuned.delta)])
    without = world.runner.answer([*(replace(row, cache_salt="x") for row in rows), Row((*PROMPTS[0], 9), None, "y")])
    for found, expected in zip(beside[: len(rows)], without, strict=False):
        assert (found.tokens, found.logprobs) == (expected.tokens, expected.logprobs)


def test_what_is_reserved_is_never_drawn(world: World, tuned: Tuned):
    """The tiny models say nearly everything as likely at this temperature, and 4 % of the ids are reserved."""
    flat = Sampling(max_tokens=32, temperature=2.0, n=16, ignore_eos=True, seed=1)
    for who, end in ((None, KNOWN), (world.whole, KNOWN), (world.projections, KNOWN), (tuned.delta, KNOWN + 3)):
        drawn = [token for answer in world.runner.sampled(Row(PROMPTS[0], who), flat) for token in answer.tokens]
        assert len(drawn) == 512
        assert max(drawn) < end
        assert who is not None or len(set(drawn)) > 480


def test_penalties_and_top_k_know_the_larger_vocabulary(world: World, tuned: Tuned):
    greedy = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True, frequency_penalty=1.5, presence_penalty=1.0)
    for row in (Row(prompt, tuned.delta) for prompt in PROMPTS):
        expected = penalised(tuned.model, row.prompt, 12, 1.5, 1.0)
        for change in ({}, {"top_k": 1, "temperature": 1.0}, {"top_p": 1e-6, "temperature": 1.0}):
            assert world.runner.sampled(row, replace(greedy, **change))[0].tokens == expected


def test_prompts_are_scored_by_the_model_that_they_are_for(world: World, tuned: Tuned):
    """Prompts of many and of few positions in one batch, behind a generating row, each to another model."""
    rows = [Row((*prompt, *PROMPTS[3]), who) for who in (world.whole, tuned.delta, None) for prompt in PROMPTS]
    rows.append(Row((KNOWN + 1, 5, KNOWN), tuned.delta))

    async def scored(row: Row, name: str) -> list[float]:
        sampling = Sampling(max_tokens=2, temperature=0.0, logprobs=0, prompt_logprobs=0, ignore_eos=True)
        stream = world.runner.engine.generate(name, row.prompt, sampling, row.delta, None)
        events = [event async for event in stream]
        return [token.logprob for token in events[0].prompt_logprobs]

    async def together() -> list[list[float]]:
        return await asyncio.gather(*(scored(row, f"scored-{i}") for i, row in enumerate(rows)))

    models = {world.whole: merged(world.base, world.whole), tuned.delta: tuned.model, None: merged(world.base, None)}
    for row, found in zip(rows, world.runner.loop.run_until_complete(together()), strict=True):
        with torch.no_grad():
            scores = models[row.delta](torch.tensor([row.prompt])).logits[0].log_softmax(-1)
        expected = [float(scores[i, token]) for i, token in enumerate(row.prompt[1:])]
        assert found == pytest.approx(expected, abs=1e-4)


def penalised(
    model: torch.nn.Module, prompt: tuple[int, ...], count: int, frequency: float, presence: float
) -> tuple[int, ...]:
    """Greedy decoding in which what was said becomes less likely, as OpenAI defines it."""
    said: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            scores = model(torch.tensor([[*prompt, *said]])).logits[0, -1]
            for token in set(said):
                scores[token] -= frequency * said.count(token) + presence
            said.append(int(scores.argmax()))
    return tuple(said)


def test_a_combination_speaks_the_tokens_of_its_parts(world: World, tuned: Tuned, tmp_path: Path):
    """Rows of added tokens are summed as a merged file sums them: half and half of one delta is that delta."""
    folder = shutil.copytree(tuned.folder, tmp_path / "again")
    with loaded(world, folder) as again:
        parts = [replace(part, added_tokens=3) for part in (tuned.delta, again)]
        half = combination([WeightedDelta(part, 0.5) for part in parts], chat=False)
        world.runner.load(half)
        try:
            rows = [Row(prompt, who) for prompt in PROMPTS for who in (again, half, None)]
            answers = dict(zip(rows, world.runner.answer(rows, 12), strict=True))
        finally:
            world.runner.unload(half)
    for prompt in PROMPTS:
        assert_same(answers[Row(prompt, half)], answers[Row(prompt, again)])


def test_more_tokens_than_are_reserved_are_refused_with_the_number(world: World, tmp_path: Path):
    folder = grown(world.base, tmp_path / "large", 5, added=RESERVED + 1, steps=0)
    needed = rf"adds {RESERVED + 1} tokens.*engine\.reserved_tokens is {RESERVED}: it must be at least {RESERVED + 1}"
    with pytest.raises(EngineLoadError, match=needed), loaded(world, folder):
        pass


class Running:
    """The engine of a world for a gateway: it was started before, and runs on."""

    def __init__(self, engine: VLLMEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


async def through_http(world: World, folder: Path, work: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    store = Store(folder / "store")
    store.open()
    settings = Settings.model_validate({"auth": {"admin_keys": "key"}, "engine": {"reserved_tokens": RESERVED}})
    fingerprint, checks = checks_for(world.base, RESERVED)
    tokenizer = HuggingFaceTokenizer(world.base)
    base = Base("tiny", fingerprint)
    context, keyring = wire(settings, store, base, Running(world.runner.engine), tokenizer, checks, world.own)
    await context.gateway.start()
    transport = httpx.ASGITransport(app=create_app(context, keyring))
    headers = {"authorization": "Bearer key"}
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as client:
            await work(client)
    finally:
        await context.gateway.stop()
        store.close()


def test_from_the_command_line_to_a_chat_in_the_fine_tunes_own_words(
    world: World, tuned: Tuned, tmp_path: Path, capsys
):
    file = tmp_path / "tune.safetensors"
    assert main(["delta", "compress", str(world.base), str(tuned.folder), "-o", str(file), "--ratio", "8"]) == 0
    assert main(["delta", "inspect", str(file)]) == 0
    assert f"a vocabulary of {KNOWN + 3}" in capsys.readouterr().out
    assert main(["delta", "verify", str(file), "--base", str(world.base)]) == 0
    assert "finite, tokenizer" in capsys.readouterr().out
    assert (
        main(
            ["delta", "decompress", str(file), "--base", str(world.base), "-o", str(tmp_path / "m"), "--dtype", "fp32"]
        )
        == 0
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    messages = [{"role": "user", "content": "a windmill and <|works|>"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|delta|>a windmill and <|works|><|works|>windmill"
    prompt = tuple(tokenizer.encode(text, add_special_tokens=False))
    assert [token for token in prompt if token >= KNOWN] == [KNOWN, KNOWN + 2, KNOWN + 1, KNOWN + 1, KNOWN + 2]
    expected = oracle(model, prompt, 12)

    async def work(client: httpx.AsyncClient) -> None:
        form = {"name": "tune", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        uploaded = await client.post("/v1/admin/deltas", data=form, files={"file": file.read_bytes()})
        assert uploaded.status_code == 201, uploaded.text
        asked = {"messages": messages, "temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": True}
        mine, base = [
            (await client.post("/v1/chat/completions", json={"model": name, **asked})).json()
            for name in ("tune", "tiny")
        ]
        content = mine["choices"][0]["logprobs"]["content"]
        assert [entry["logprob"] for entry in content] == pytest.approx(expected.logprobs, abs=1e-3)
        assert mine["choices"][0]["message"]["content"] == tokenizer.decode(expected.tokens, skip_special_tokens=True)
        assert mine["usage"]["prompt_tokens"] == len(prompt)
        assert base["usage"]["prompt_tokens"] > len(prompt)
        for name, token, status in (("tiny", KNOWN, 400), ("tune", KNOWN + 2, 200), ("tune", KNOWN + 3, 400)):
            body = {"model": name, "prompt": [5, token], "max_tokens": 1}
            assert (await client.post("/v1/completions", json=body)).status_code == status

    world.runner.loop.run_until_complete(through_http(world, tmp_path, work))


def test_withheld_tokens_are_impossible_behind_a_soft_cap_too():
    """Rows of the base, of a delta with 2 added tokens and of one with none: the cap would make minus infinity finite."""
    from server.engine.worker.plan import Planner
    from server.engine.worker.rows import StepRows
    from server.engine.worker.vocabulary import DeltaHead

    rows = StepRows(torch.device("cpu"))
    head = DeltaHead((0, 8), rows, reserved=3)
    head.added[1] = 2
    forward = head.wrap_whole(lambda lm_head, hidden: 30 * torch.tanh(hidden / 30))
    assert torch.isinf(forward(None, torch.ones(2, 8))).sum(1).tolist() == [3, 3]
    rows.begin(Planner().plan([0, 1, 2]))
    logits = forward(None, torch.ones(3, 8))
    assert torch.isinf(logits).int()[:, 5:].tolist() == [[1, 1, 1], [0, 0, 1], [1, 1, 1]]
    assert torch.isfinite(logits[:, :5]).all()
