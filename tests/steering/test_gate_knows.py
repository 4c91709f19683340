"""The probe of the stage `hidden`: streams of a real forward, a fit judged out of fold, a profile without directions."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from steering.activations import load_tokenizer
from steering.errors import FitError, LabelError
from steering.eval_cli import add_parser
from steering.gate import knows
from steering.gate.fit import Identity, binding
from steering.gate.knows import (
    Streams,
    fit_knows,
    open_streams,
    record,
    with_scores,
    write_knows,
    write_streams,
)
from steering.gate.labels import LabelRow
from steering.gate.policy import read_policy
from steering.gate.schema import parse
from steering.gate.stages import Splits
from steering.gate.tasks import Task
from steering.header import ProfileHeader, file_sha256
from steering.profile import Profile, check_profile
from tests.steering.gate_world import gate, read_row, rows, tool, write_rows
from tests.steering.small_world import LAYERS, WIDTH, collected, world

TEMPLATE = "{% for m in messages %}question: {{ m.content }}\n{% endfor %}answer:"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world's model, with a chat template."""
    folder = tmp_path_factory.getbasetemp() / "knows-model"
    shutil.copytree(world(tmp_path_factory.mktemp("knows"))[0], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return folder


def tasks(count: int) -> list[Task]:
    return [parse(Task, json.dumps(task(number))) for number in range(count)]


def task(number: int) -> dict[str, Any]:
    question = " ".join(f"q{(number + more) % 40}" for more in range(1 + number % 3))  # of three lengths
    return {"id": f"t{number}", "question": question, "tools": [tool("search")], "tool_kinds": {}, "gold": ["a"]}


def label_rows(count: int) -> list[LabelRow]:
    return [read_row(row) for row in rows(count)]


def streams_of(found: list[LabelRow], told: int | None = 1, seed: int = 0) -> Streams:
    """Layers of noise; the first value of layer `told` is high for what is known."""
    generator = torch.Generator().manual_seed(seed)
    layers = {layer: torch.randn(len(found), 64, generator=generator) for layer in range(3)}
    if told is not None:
        layers[told][:, 0] += 6 * torch.tensor([row.p_known for row in found])
    return Streams(tuple(row.id for row in found), layers)


def test_streams_are_those_behind_the_last_token_of_the_prompt(model: Path, tmp_path: Path) -> None:
    asked = tasks(7)
    found = record(asked, model, None)
    assert (found.ids, list(found.layers)) == (tuple(one.id for one in asked), list(range(LAYERS)))
    write_streams(found, tmp_path / "streams.safetensors")
    again = open_streams(tmp_path / "streams.safetensors")
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), load_tokenizer(model)
    for place, one in enumerate(asked):
        ids = tokenizer(f"question: {one.question}\nanswer:", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            hidden = loaded(ids, output_hidden_states=True).hidden_states
        # the last of transformers' states is behind the final norm, the stream of layer 0 is as it is
        torch.testing.assert_close(again.layers[0][place], hidden[1][0, -1])
    assert again.layers[1].shape == (7, WIDTH)
    assert list(record(asked, model, (1,)).layers) == [1]


def test_what_was_read_before_an_interruption_is_not_read_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, part, read = tasks(12), tmp_path / "s.part", knows.read_streams
    whole, batches = record(asked, model, None), []

    def until_the_third(model: Any, ids: torch.Tensor, layers: list[int]) -> dict[int, torch.Tensor]:
        batches.append(len(ids))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return read(model, ids, layers)

    monkeypatch.setattr(knows, "read_streams", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        record(asked, model, None, part=part)
    batches.clear()
    monkeypatch.setattr(knows, "read_streams", lambda *a: (batches.append(len(a[1])), read(*a))[1])
    found = record(asked, model, None, part=part)
    assert batches == [4]  # the three lengths have four questions each
    assert found.ids == whole.ids
    for layer, rows_of_layer in whole.layers.items():
        torch.testing.assert_close(found.layers[layer], rows_of_layer)
    batches.clear()
    record(asked, model, (1,), part=part)  # other layers: nothing of it serves
    assert sum(batches) == 12
    batches.clear()
    part.write_bytes(b"damaged")
    record(asked, model, None, part=part)
    assert sum(batches) == 12


def test_the_layer_that_tells_is_found_and_noise_is_called_noise() -> None:
    found = label_rows(400)
    fitting = found[:200]
    told = fit_knows(found, fitting, streams_of(found), r=0.75)
    assert told.header.layer == 1
    assert told.header.auroc > 0.9
    assert told.header.n == 200
    fresh = torch.tensor([[told.scores[row.id], row.p_known] for row in found[200:]])
    assert float(torch.corrcoef(fresh.T)[0, 1]) > 0.8
    noise = fit_knows(found, fitting, streams_of(found, told=None), r=0.75)
    assert 0.3 < noise.header.auroc < 0.7  # of 64 values and 200 rows: in the fold it would be far higher
    inside = torch.tensor([[noise.scores[row.id], row.p_known] for row in fitting])
    assert float(torch.corrcoef(inside.T)[0, 1]) < 0.4


def test_rows_that_are_judged_have_no_part_in_the_probe() -> None:
    """Or the bound of the harm would be of rows that were learnt."""
    found = label_rows(300)
    fitting = found[:150]
    one = fit_knows(found, fitting, streams_of(found), r=0.75)
    turned = [row.model_copy(update={"p_known": 1 - row.p_known}) for row in found[150:]]
    other = fit_knows(fitting + turned, fitting, streams_of(found), r=0.75)
    assert torch.equal(one.probe.weight, other.probe.weight)
    assert one.scores == other.scores
    scored = with_scores(found, one)
    assert [row.features["hidden"]["hidden.score"] for row in scored] == [one.scores[row.id] for row in found]
    assert {row.tokens["hidden"] for row in scored} == {1}


def test_too_few_rows_and_rows_without_streams() -> None:
    found = label_rows(60)
    with pytest.raises(FitError, match="needs 10 known and 10 unknown rows"):
        fit_knows(found, found[:12], streams_of(found), r=0.75)
    with pytest.raises(FitError, match=r"no task 'q5[0-9]' \(10 of 60 rows are missing\)"):
        fit_knows(found, found, streams_of(found[:50]), r=0.75)


def test_a_fit_writes_a_profile_that_a_server_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(900)
    parsed = [read_row(row) for row in found]
    labels, streams = write_rows(tmp_path / "labels.jsonl", found), tmp_path / "streams.safetensors"
    write_streams(streams_of(parsed), streams)
    out, profile = tmp_path / "policy.json", tmp_path / "knows.safetensors"
    assert gate("fit", labels, "-o", out, "--streams", streams, "--probe-out", profile, "--stages", "hidden") == 0
    said = capsys.readouterr()
    assert "probe: layer 1, AUROC 0.9" in said.out
    assert "no profile is named" not in said.err
    made = read_policy(out)
    assert (made.probes.order, made.probes.hidden_profile) == (("hidden",), file_sha256(profile))
    header = check_profile(profile, "sha256:base", 64, 3)
    assert (header.directions, header.layers, header.model_name) == ({}, {}, "tiny")
    probe = Profile.open(profile).probe
    assert probe is not None
    fitting = Splits.of(parsed, (0.4, 0.25, 0.35), 0).fit
    again = fit_knows(parsed, fitting, streams_of(parsed), 0.75)
    assert torch.equal(probe.weight, again.probe.weight)


def test_mistakes(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels, other = write_rows(tmp_path / "labels.jsonl", rows(300)), tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    for more, message in (
        (("--streams", other), "--streams and --probe-out belong together"),
        (("--probe-out", other), "--streams and --probe-out belong together"),
        (("--streams", other, "--probe-out", "p", "--hidden-profile", "a" * 64), "--streams fits a new one"),
        (("--streams", other, "--probe-out", "p"), "holds no streams"),
        (("--streams", tmp_path / "none", "--probe-out", "p"), "holds no streams"),
    ):
        assert gate("fit", labels, "-o", tmp_path / "policy.json", *more) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "policy.json").exists()
    file = tmp_path / "tasks.jsonl"
    file.write_text(json.dumps(task(0)) + "\n")
    assert gate("streams", file, model, "-o", tmp_path / "s.safetensors", "--layers", "7") == 1
    assert "layers [7] are not within the model's 0 to 1" in capsys.readouterr().err
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copy(model / name, tmp_path / "bare")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "bare" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(LabelError, match="has no chat template"):
        record(tasks(1), tmp_path / "bare", None)


def test_a_probe_alone_steers_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "knows.safetensors"
    found = label_rows(100)
    write_knows(fit_knows(found, found, streams_of(found), 0.75), binding(found, Identity()), path)
    root = tmp_path / "root"
    root.mkdir()
    collected(root)
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    asked = ["eval", str(path), "--collected", str(root / "collected"), "--model", str(world(root)[0])]
    args = parser.parse_args(asked)
    assert args.run(args) == 1
    assert "holds a probe alone" in capsys.readouterr().err


def test_a_profile_steers_or_reads() -> None:
    fields = {"base_fingerprint": "sha256:b", "model_name": "m", "template_sha256": "", "d_in": 4}
    with pytest.raises(ValueError, match="nothing is steered, and there is no probe"):
        ProfileHeader.model_validate(fields)
    with pytest.raises(ValueError, match="directions and layers are there together"):
        ProfileHeader.model_validate({**fields, "directions": {"use_context": {"layers": [0]}}})
