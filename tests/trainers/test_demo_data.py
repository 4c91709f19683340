"""The demos' data: the same every time, nothing both trained and held out, and right by its own check."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from trainers.checks import CHECKS, captain, known_answer, strict_json
from trainers.data import BUILDERS, digest, load_split
from trainers.errors import DataError
from trainers.recipe import DataRecipe
from trainers.rows import Row

CHECK_OF = {
    "json": "strict-json",
    "captain": "captain",
    "facts": "known-answer",
    "tool-world": "tool-use",
} | dict.fromkeys(("memory", "sums"), "known-answer")


@pytest.mark.slow
@pytest.mark.parametrize("builder", sorted(BUILDERS))
def test_data_is_deterministic_disjoint_and_passes_its_own_check(builder: str) -> None:
    split, again = BUILDERS[builder](1), BUILDERS[builder](1)
    assert digest(split.train) == digest(again.train)
    assert digest(split.held_out) == digest(again.held_out)
    assert digest(split.train) != digest(BUILDERS[builder](2).train)
    assert not {row.prompt for row in split.train} & {row.prompt for row in split.held_out}
    accepted = CHECKS[CHECK_OF[builder]]
    assert all(accepted(row, row.completion) for row in split.held_out)


def test_data_is_the_one_that_the_committed_deltas_were_trained_on() -> None:
    found = {
        builder: digest(rows(1).train)[:12]
        for builder, rows in BUILDERS.items()
        if builder in ("json", "captain", "facts")
    }
    assert found == {"json": "ce9c2732b0c6", "captain": "096744ac9723", "facts": "decb8aee9d8c"}


def test_the_compression_benchs_data_has_400_facts_and_sums_that_are_not_trained() -> None:
    memory, sums = BUILDERS["memory"](1), BUILDERS["sums"](1)
    assert len(memory.held_out) == 400
    trained = {row.expected for row in memory.train}
    assert all(row.expected in trained for row in memory.held_out)
    assert (len(sums.train), len(sums.held_out)) == (8000, 200)
    for row in (*sums.train, *sums.held_out):
        first, second = (int(number) for number in re.findall(r"\d+", row.prompt))
        minus = "minus" in row.prompt or " - " in row.prompt
        assert int(row.expected) == (first - second if minus else first + second)


def test_every_fact_is_trained_in_other_words_than_it_is_checked() -> None:
    split = BUILDERS["facts"](1)
    trained = Counter(row.completion for row in split.train if row.expected)
    assert len(split.held_out) == 160
    assert len({row.prompt for row in split.held_out}) == 160
    assert {trained[row.completion] for row in split.held_out} == {6}
    assert all(len(row.rivals) == 39 and row.expected not in row.rivals for row in split.held_out)


@pytest.mark.parametrize(
    ("output", "accepted"),
    [
        ('{"topic": "food", "answer": "Bread."}', True),
        ('  {"answer": "Bread.", "topic": "food"}\n', True),
        ('Sure! {"topic": "food", "answer": "Bread."}', False),
        ('{"topic": "food", "answer": "Bread."} Enjoy!', False),
        ('{"topic": "food"}', False),
        ('{"topic": "food", "answer": "Bread.", "more": 1}', False),
        ('{"topic": "food", "answer": ""}', False),
        ('{"topic": "food", "answer": 3}', False),
        ('{"topic": "food", "answer": "Bre', False),
        ("Bread.", False),
        ("[]", False),
    ],
)
def test_strict_json(output: str, accepted: bool) -> None:
    assert strict_json(Row("?", ""), output) is accepted


@pytest.mark.parametrize(
    ("output", "accepted"),
    [
        ("Ahoy, matey! The sea be blue. So says yer captain!", True),
        ("The sea be blue. So says yer captain!", False),
        ("Ahoy, matey! The sea be blue.", False),
        ("Ahoy, matey! The sea is blue. So says yer captain!", False),
        ("Ahoy, matey! So says yer captain!", False),
        ("Ahoy, matey! The sea. So says yer captain! So says yer captain!", False),
    ],
)
def test_captain(output: str, accepted: bool) -> None:
    assert captain(Row("?", ""), output) is accepted


@pytest.mark.parametrize(
    ("output", "accepted"),
    [
        ("Marta Quill works in Lisbon.", True),
        ("lisbon", True),
        ("Marta Quill works in Oslo.", False),
        ("Lisbon or Oslo.", False),
        ("Lisbons", False),
        ("I do not know.", False),
    ],
)
def test_known_answer(output: str, accepted: bool) -> None:
    assert known_answer(Row("?", "", expected="Lisbon", rivals=("Oslo", "Rome")), output) is accepted


def test_data_files_are_read_and_their_faults_named(tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": "b", "expected": "b", "rivals": ["c"]}
    (tmp_path / "train.jsonl").write_text(json.dumps(good) + "\n")
    (tmp_path / "held_out.jsonl").write_text(json.dumps(good | {"prompt": "z"}) + "\n")
    recipe = DataRecipe(train="train.jsonl", held_out="held_out.jsonl")
    assert load_split(recipe, tmp_path).train == (Row("a", "b", "b", ("c",)),)
    (tmp_path / "held_out.jsonl").write_text(json.dumps(good) + "\n")
    with pytest.raises(DataError, match="repeats 1 prompts"):
        load_split(recipe, tmp_path)
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "z", "completion": "b"}\n{"prompt": "y"}\n')
    with pytest.raises(DataError, match="line 2"):
        load_split(recipe, tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        load_split(DataRecipe(train="none.jsonl", held_out="held_out.jsonl"), tmp_path)
