"""Checks of models and deltas through the command line, on a tiny fine-tune."""

import json
from pathlib import Path

import pytest
import torch

from server.cli import main
from trainers.evaluate import Success, answers, judge, load_model
from trainers.recipe import CheckRecipe
from trainers.rows import Row


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_answers_in_a_batch_equal_answers_alone(tiny_base: Path) -> None:
    loaded = load_model(tiny_base)
    prompts = ["a?", "what else is there?", "b?"]
    together = answers(loaded, prompts, max_new_tokens=6, batch_size=3)
    assert together == [answers(loaded, [prompt], max_new_tokens=6)[0] for prompt in prompts]


def test_a_rate_counts_what_the_check_accepts() -> None:
    rows = [Row("a", "", expected="yes", rivals=("no",)), Row("b", "", expected="no", rivals=("yes",))]
    success = judge(CheckRecipe(kind="known-answer"), rows, ["yes", "yes"])
    assert (success.rate, success.failures[0].prompt) == (0.5, "b")
    assert Success(3, ()).rate == 1.0


@pytest.mark.slow
def test_train_compress_and_check_by_command(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_base: Path
) -> None:
    run, delta = tmp_path / "run", tmp_path / "tiny.safetensors"
    assert main(["train", "sft", str(recipe_file), "--output", str(run)]) == 0
    assert main(["delta", "compress", str(tiny_base), str(run / "model"), "-o", str(delta), "--ratio", "2"]) == 0
    capsys.readouterr()
    for what in ([], ["--model", str(run / "model")], ["--delta", str(delta)]):
        assert main(["train", "check", str(recipe_file), "--json", *what]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["total"] == 2
        assert found["rate"] == 1 - len(found["failures"]) / 2


def test_faults_are_one_line_on_stderr(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "sft", str(tmp_path / "none.toml")]) == 1
    assert capsys.readouterr().err.startswith("error: cannot read the recipe")
    garbage = tmp_path / "x.safetensors"
    garbage.write_bytes(b"garbage")
    assert main(["train", "check", str(recipe_file), "--delta", str(garbage)]) == 1
    assert capsys.readouterr().err.startswith("error: ")
