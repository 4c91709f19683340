import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steering.activations import load_model, load_tokenizer, read_streams
from steering.answers import Answerer, Batch
from steering.collect import closed_book, collect, unit_prompts
from steering.collected import Collected, CollectSettings, read_settings, shard_file, shard_files
from steering.errors import SteeringError
from steering.facts import load_nq_swap
from steering.prompts import closed_prompt, grouped, open_prompt
from tests.steering import small_world


@pytest.fixture(scope="module")
def answerer(tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    model, _ = small_world.world(tmp_path_factory.getbasetemp())
    return Answerer(load_model(model), load_tokenizer(model), batch_size=3)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Collected:
    return small_world.collected(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of three lengths, with a common beginning in the first ones."""
    facts = load_nq_swap(small_world.world(tmp_path_factory.getbasetemp())[1])
    shared = [open_prompt(facts[:2], "dss", fact) for fact in facts[10:14]]
    return [*shared, *[closed_prompt(facts[:2], fact) for fact in facts[20:23]], open_prompt([], "doo", facts[30])]


def settings_of(factory: pytest.TempPathFactory, **changes: Any) -> CollectSettings:
    model, facts = small_world.world(factory.getbasetemp())
    return CollectSettings(**({"model": str(model), "facts": f"nqswap:{facts}"} | small_world.SETTINGS | changes))


def read_all(answerer: Answerer, prompts: list[str]) -> tuple[list[str], torch.Tensor, list[float]]:
    """Answers, streams of layer 1 and losses with the answer ` a5`, in the order of the prompts."""
    answers, losses = [""] * len(prompts), [0.0] * len(prompts)
    streams = torch.zeros(len(prompts), small_world.WIDTH)
    a5 = answerer.tokens(" a5")
    for batch in answerer.prefill([answerer.tokens(prompt) for prompt in prompts], losses=True):
        ended = answerer.end(batch, layers=[1])
        values = zip(
            batch.rows, answerer.answers(ended), answerer.mean_losses(ended, [a5] * len(batch.rows)), strict=True
        )
        for row, answer, loss in values:
            answers[row], losses[row] = answer, loss
        streams[batch.rows] = ended.streams[1]
    return answers, streams, losses


def test_a_batch_is_what_the_model_does_with_each_prompt_alone(answerer: Answerer, prompts: list[str]) -> None:
    answers, streams, losses = read_all(answerer, prompts)
    assert len(set(answers)) > 4
    for prompt, answer, stream, loss in zip(prompts, answers, streams, losses, strict=True):
        ids = torch.tensor([answerer.tokens(prompt)])
        out = answerer.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        text = answerer.tokenizer.decode(out[0, ids.shape[1] :])
        assert answer == text.split("\n")[0].strip()
        torch.testing.assert_close(stream, read_streams(answerer.model, ids[0], [1])[1][-1], rtol=1e-4, atol=1e-4)
        whole = torch.tensor([answerer.tokens(prompt) + answerer.tokens(" a5")])
        with torch.inference_mode():
            assert loss == pytest.approx(float(answerer.model(whole, labels=whole).loss), rel=1e-4)


def test_edits_touch_the_last_prompt_position_of_their_row_only(answerer: Answerer, prompts: list[str]) -> None:
    push = torch.linspace(-3, 3, small_world.WIDTH)
    ids = [answerer.tokens(prompt) for prompt in prompts]
    for batch in answerer.prefill(ids):
        before = answerer.answers(answerer.end(batch, layers=[1]))
        ended = answerer.end(batch, {0: lambda rows: rows + push}, layers=[0, 1])
        edited = answerer.answers(ended)
        assert answerer.answers(answerer.end(batch)) == before  # the batch is as it was
        for row, stream, answer in zip(batch.rows, ended.streams[1], edited, strict=True):
            position = len(ids[row]) - 1

            def hook(module: Any, arguments: Any, output: torch.Tensor, position: int = position) -> torch.Tensor:
                changed = output.clone()
                if changed.shape[1] > position:
                    changed[:, position] += push
                return changed

            handle = answerer.model.model.layers[0].register_forward_hook(hook)
            text = torch.tensor([ids[row]])
            expected = read_streams(answerer.model, text[0], [1])[1][-1]
            out = answerer.model.generate(
                text, attention_mask=torch.ones_like(text), max_new_tokens=12, do_sample=False
            )
            handle.remove()
            torch.testing.assert_close(stream, expected, rtol=1e-4, atol=1e-4)
            assert answer == answerer.tokenizer.decode(out[0, text.shape[1] :]).split("\n")[0].strip()


def test_what_the_model_knows_is_found(found: Collected) -> None:
    assert sum(found.known.memorised) == small_world.FACTS
    assert found.known.answers[3] == "a3"
    assert len(found.known.split.pool) == len(found.held_out()) == 20
    assert {fact.group for fact in found.pool()} == {fact.group for fact in found.known_pool()}
    assert {fact.group for fact in found.pool()}.isdisjoint(fact.group for fact in found.held_out())


def test_labels_are_the_source_that_answered(found: Collected) -> None:
    samples = found.samples(1)
    assert len(samples.labels) == sum(sum(counts.values()) for counts in found.counts().values())
    right = [
        int(group.removeprefix("q")) % 2 == 1 - label
        for group, label in zip(samples.groups, samples.labels, strict=True)
    ]
    assert sum(right) / len(right) > 0.9
    assert 0.2 < float(samples.labels.float().mean()) < 0.8
    assert found.counts().keys() == {"dss", "dso", "doo"}
    unlikely = samples.labels == 0  # the losses speak for the answer that was given
    assert float((samples.conflict_losses > samples.original_losses)[unlikely].float().mean()) > 0.9
    assert float((samples.conflict_losses < samples.original_losses)[~unlikely].float().mean()) > 0.9


def test_states_are_those_of_the_last_prompt_token(found: Collected, answerer: Answerer) -> None:
    """The demonstrations are found again by trying all pairs: the state tells which prompt it was read on."""
    facts = {group: facts[0] for group, facts in grouped(found.facts).items()}
    pool = [facts[group] for group in found.known.split.pool]
    samples = found.samples(1)
    wanted, item = samples.h[0], facts[samples.groups[0]]
    pairs = [(a, b) for a in pool for b in pool if a != b and item not in (a, b)]
    ids = [answerer.tokens(open_prompt(pair, found.settings.styles[0], item)) for pair in pairs]
    streams = read_streams(answerer.model, torch.tensor(ids), [1])[1][:, -1]
    assert float((streams - wanted).abs().amax(1).min()) < 1e-4


def test_probe_data_pairs_the_two_documents(found: Collected) -> None:
    samples = found.probe_samples(0)
    assert found.probe_layers() == [0, 1]
    assert int(samples.labels.sum()) * 2 == len(samples.labels) >= 50
    for group in set(samples.groups):
        labels = [int(label) for name, label in zip(samples.groups, samples.labels, strict=True) if name == group]
        assert sorted(labels) == [0, 1]
    assert not torch.equal(samples.h, found.probe_samples(1).h)


def test_an_interrupted_collection_goes_on(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path_factory, shots=(2,))
    whole = collect(settings, tmp_path)
    files = shard_files(tmp_path, settings)
    content = {
        path: path.read_bytes() for path in [*files, tmp_path / "memorised.json", tmp_path / "probe.safetensors"]
    }
    kept_at = files[0].stat().st_mtime_ns
    files[2].unlink()
    with pytest.raises(SteeringError, match=r"unfinished, dso|unfinished, doo"):
        Collected.open(tmp_path)
    again = collect(settings, tmp_path)
    assert files[0].stat().st_mtime_ns == kept_at
    assert {path: path.read_bytes() for path in content} == content
    assert again == whole
    with pytest.raises(SteeringError, match=r"was begun with seeds = \(1, 2\), not \(1,\)"):
        collect(settings_of(tmp_path_factory, shots=(2,), seeds=(1,)), tmp_path)


def test_demonstrations_per_item(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    settings = settings_of(tmp_path_factory, shots=(2,), seeds=(1,), demonstrations="per-item", limit=30, pool=8)
    found = collect(settings, tmp_path)
    assert len(found.facts) == 30
    counts = found.counts()
    assert {sum(of_style.values()) for of_style in counts.values()} == {8}  # no item is left out
    assert read_settings(tmp_path) == settings


class Recording(Answerer):
    """Keeps the prompts that it is asked."""

    def prefill(self, prompts: Sequence[Sequence[int]], losses: bool = False) -> Iterator[Batch]:
        self.asked: list[str] = [*getattr(self, "asked", []), *(self.tokenizer.decode(ids) for ids in prompts)]
        return super().prefill(prompts, losses)


def test_items_are_asked_after_others_of_their_category(
    tmp_path_factory: pytest.TempPathFactory, answerer: Answerer
) -> None:
    facts = load_nq_swap(small_world.world(tmp_path_factory.getbasetemp())[1])
    kinds = {fact.question: "abc"[index % 3] for index, fact in enumerate(facts)}
    facts = [replace(fact, category=kinds[fact.question]) for fact in facts]
    recording = Recording(answerer.model, answerer.tokenizer)
    known = closed_book(facts, recording, settings_of(tmp_path_factory))
    assert sum(known.memorised) > 20  # the tiny model is used to more demonstrations than a third of the facts give
    assert len(recording.asked) == len(facts)
    settings = settings_of(tmp_path_factory, demonstrations="per-item")
    for per_item in (settings, replace(settings, demonstrations="shared")):
        parts = unit_prompts(facts, "dso", 2, 1, per_item, answerer)
        assert {len({one.fact.category for one in part}) for part in parts} == {1}
        recording.asked += [answerer.tokenizer.decode(one.ids) for part in parts for one in part]
    assert len(recording.asked) == 3 * len(facts) - 3 * 2
    for prompt in recording.asked:
        questions = re.findall(r"question: (q\d+)", prompt)
        assert len(questions) == len(set(questions)) > 2
        assert len({kinds[question] for question in questions}) == 1
    mixed = unit_prompts(facts, "dso", 2, 1, replace(settings, same_category=False), answerer)
    assert len(mixed) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (0, 2)}, "layer 2 is not within the model's 0 to 1"),
        ({"layers": ()}, "give the layers"),
        ({"layers": (1, 1)}, "layers must be different"),
        ({"styles": ("dss", "sss")}, "style 'sss' is not one of"),
        ({"demonstrations": "own"}, "demonstrations are shared or per-item"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"limit": 6}, "the model knows"),
        ({"shots": (0,)}, "at least one demonstration"),
        ({"facts": "nqswap:none.jsonl"}, "No such file"),
        ({"model": "nowhere"}, "nowhere is not a model folder"),
    ],
)
def test_bad_settings(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteeringError, match=message):
        collect(settings_of(tmp_path_factory, **changes), tmp_path)


def test_damaged_folders(found: Collected, tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match="holds no collection"):
        Collected.open(tmp_path)
    with pytest.raises(SteeringError, match="layer 7 was not collected"):
        found.samples(7)
    with pytest.raises(SteeringError, match="no states of layer 7"):
        found.probe_samples(7)
    (tmp_path / "settings.json").write_text(json.dumps({"model": "x"}))
    with pytest.raises(SteeringError, match="is damaged"):
        Collected.open(tmp_path)
    assert shard_file(tmp_path, "dss", 3, 42).name == "dss-k3-s42.safetensors"
