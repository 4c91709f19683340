"""The world of tools: its truth, its rows in the server's rendering, and the tasks that a gate is fitted and judged on."""

import asyncio
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from server.cli import main
from server.prompt import HuggingFaceTokenizer, PromptRenderer
from server.schemas import ChatRequest
from server.tool_template import shipped
from server.tools import Toolbox
from steering.gate.tasks import read_facts, read_tasks
from steering.gate.tools import calculated
from steering.matching import normalised
from trainers.checks import tool_use
from trainers.data import BUILDERS, load_split, tool_template
from trainers.errors import DataError
from trainers.recipe import DataRecipe, load_recipe
from trainers.rows import Row
from trainers.tokens import IGNORED, chat_ids, tokenize_row
from trainers.tool_rows import ASKED_SUMS, TRAINED_SUMS
from trainers.tool_world import MIXED_SET, PLAIN_SET, SIZES, Call, read_archive, sums

RECIPE = Path(__file__).parents[2] / "trainers" / "recipes" / "tools.toml"
CALL = Call("calculator", {"expression": "12 + 7"})


def _server_ids(folder: Path, row: Row, messages: list[dict[str, object]]) -> list[int]:
    body = {"model": "m", "messages": messages} | ({"tools": list(row.tools)} if row.tools else {})
    tokenizer = HuggingFaceTokenizer(folder)
    renderer = PromptRenderer(tokenizer, shipped("hermes"), "hermes")
    request = ChatRequest.model_validate(body).to_request("1", 16)
    shown = Toolbox("hermes", True, True, 8).show(request.prompts[0], request.tools)
    return asyncio.run(renderer.render(shown))


def test_prompts_are_those_of_the_server(tiny_base: Path) -> None:
    recipe = load_recipe(RECIPE)
    template = tool_template(recipe.data, RECIPE.parent)
    assert template == shipped("hermes")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    train = load_split(recipe.data, RECIPE.parent).train
    plain, bare, called = (
        next(row for row in train if bool(row.tools) is tools and bool(row.messages) is messages)
        for tools, messages in ((False, False), (True, False), (True, True))
    )
    for row in (plain, bare, called):
        chats = [row.chat[:1], row.chat] if row.messages else [row.chat]
        for chat in chats:
            assert chat_ids(tokenizer, chat, row.tools, template) == _server_ids(tiny_base, row, chat)
    whole = tokenize_row(tokenizer, called, 4096, template)
    end = len(_server_ids(tiny_base, called, called.chat))
    assert whole.input_ids[:end] == _server_ids(tiny_base, called, called.chat)


def test_the_assistants_turns_carry_the_loss_and_nothing_else(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    answered = {"role": "tool", "tool_call_id": "1", "name": "calculator", "content": "19"}
    row = Row(
        "?", "It is 19", messages=({"role": "user", "content": "?"}, CALL.message("1"), answered), tools=PLAIN_SET
    )
    tokens = tokenize_row(tokenizer, row, 4096, shipped("hermes"))
    said = tokenizer.decode([label for label in tokens.labels if label != IGNORED])
    assert said == CALL.text() + "<|im_end|>It is 19<|im_end|>"
    assert len(tokens.labels) == len(tokens.input_ids)
    with pytest.raises(DataError, match=r"data\.tool_template"):
        tokenize_row(tokenizer, row, 4096)


@pytest.mark.parametrize(
    ("output", "accepted"),
    [
        (CALL.text(), True),
        ('<tool_call>{"arguments": {"expression": "12 + 7"}, "name": "calculator"}</tool_call>', True),
        (CALL.text() + CALL.text(), False),
        ("Sure: " + CALL.text(), False),
        (CALL.text().replace("12", "13"), False),
        (CALL.text().removesuffix("</tool_call>"), False),
        ('<tool_call>{"name": }</tool_call>', False),
        ("19", False),
    ],
)
def test_a_call_is_right_when_it_is_well_formed_and_alone(output: str, accepted: bool) -> None:
    assert tool_use(Row("?", CALL.text(), tools=PLAIN_SET), output) is accepted


def test_without_tools_the_answer_counts() -> None:
    row = Row("?", "oak", expected="oak", rivals=("ivy",))
    assert tool_use(row, "Oak.")
    assert not tool_use(row, "ivy")


def test_untrained_facts_are_in_no_row_and_nothing_tells_them_apart() -> None:
    archive = read_archive(1)
    assert (len(archive.trained), len(archive.untrained), len(archive.gaps)) == (120, 60, 60)
    assert len({normalised(fact.key) for fact in archive.facts}) == 240
    asked = {question for fact in archive.untrained for question in fact.questions + fact.held_out}
    assert not asked & {row.prompt for row in BUILDERS["tool-world"](1).train}
    attributes = Counter(fact.attribute for fact in archive.untrained)
    assert set(attributes) == {"keeper", "room", "town", "emblem", "guild", "codeword"}
    assert min(attributes.values()) >= 5
    assert read_archive(2).trained != archive.trained


def test_what_the_model_is_told_not_to_know_is_asked_nowhere_else() -> None:
    archive, split = read_archive(1), BUILDERS["tool-world"](1)
    unknown = [row for row in split.train if row.completion == "I do not know."]
    assert not any(row.tools for row in unknown)
    visiting = {question for fact in archive.visitors for question in fact.questions}
    gaps = {question for fact in archive.gaps for question in fact.questions}
    assert len([row for row in unknown if row.prompt in visiting]) == 72
    assert len([row for row in unknown if row.prompt in gaps]) == 4 * 60
    assert len(unknown) == 72 + 4 * 60 + 72
    assert not gaps & {row.prompt for row in split.train if row.completion != "I do not know."}
    limits = [row for row in split.held_out if row.completion == "I do not know."]
    assert len({row.prompt for row in limits}) == len(limits) == 30
    assert {row.prompt for row in limits} < {question for fact in archive.untrained for question in fact.held_out}
    for row in limits:
        assert tool_use(row, "I do not know.")
        assert not any(tool_use(row, answer) for answer in (row.rivals[0], f"I know: {row.rivals[-1]}.", "Nobody is."))
    _, asked = sums(1, TRAINED_SUMS, ASKED_SUMS)
    numbers = {tuple(re.findall(r"\d+", one.asked("{a} {sign} {b}"))) for one in asked}
    sums_unknown = [row.prompt for row in unknown if row.prompt not in visiting | gaps]
    assert not numbers & {tuple(re.findall(r"\d+", prompt)) for prompt in sums_unknown}


def test_a_value_belongs_to_one_collection() -> None:
    for attribute in ("keeper", "room", "town", "emblem", "guild", "codeword"):
        assert len({fact.value.lower() for fact in read_archive(1).facts if fact.attribute == attribute}) == 40


def test_sums_are_right_and_apart() -> None:
    train, asked = sums(3, {2: 50}, dict.fromkeys(SIZES, 30))
    assert Counter(one.size for one in asked) == dict.fromkeys(SIZES, 30)
    assert not {one for one in train if one.size > 1} & set(asked)
    assert {one for one in asked if one.size == 1} < set(train)
    for one in asked:
        assert calculated(one.call.arguments["expression"]) == one.answer
        assert int(one.answer) >= 0


def test_rows_of_files_may_have_tools_and_many_turns(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "12 + 7?"},
        CALL.message("1"),
        {"role": "tool", "tool_call_id": "1", "content": "19"},
    ]
    row = {"messages": chat, "tools": list(MIXED_SET), "completion": "19"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "held_out.jsonl").write_text(json.dumps(row | {"messages": chat[:1]}) + "\n")
    recipe = DataRecipe(train="train.jsonl", held_out="held_out.jsonl", tool_template="none.jinja")
    split = load_split(recipe, tmp_path)
    assert split.train == (Row("12 + 7?", "19", messages=tuple(chat), tools=MIXED_SET),)
    with pytest.raises(DataError, match="tool template"):
        tool_template(recipe, tmp_path)
    (tmp_path / "held_out.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="repeats 1 prompts"):
        load_split(recipe, tmp_path)
    (tmp_path / "train.jsonl").write_text(json.dumps(row | {"messages": []}) + "\n")
    with pytest.raises(DataError, match="line 1: expected an object with prompt or messages"):
        load_split(recipe, tmp_path)


def test_rows_are_written_as_they_are_read(tmp_path: Path) -> None:
    assert main(["train", "rows", str(RECIPE), "--out", str(tmp_path)]) == 0
    read = load_split(DataRecipe(train="train.jsonl", held_out="held_out.jsonl", tool_template="t"), tmp_path)
    assert read == BUILDERS["tool-world"](1)


def test_tasks_are_read_by_the_gate_and_split_by_fact(tmp_path: Path) -> None:
    assert main(["train", "tool-world", "--out", str(tmp_path)]) == 0
    label, evaluation, together = (read_tasks(tmp_path / f"{name}.jsonl") for name in ("label", "eval", "tasks"))
    facts = read_facts(tmp_path / "facts.json")
    assert len(together) == len(label) + len(evaluation) == 2 * (120 + 60) + 380 + 40
    assert {task.id for task in label} | {task.id for task in evaluation} == {task.id for task in together}
    questions = [task.question for task in together]
    assert len(set(questions)) == len(questions)
    assert not set(questions) & {row.prompt for row in BUILDERS["tool-world"](1).train}
    fact_of = [{task.id.rsplit("-", 1)[0] for task in part if "trained" in task.id} for part in (label, evaluation)]
    assert not fact_of[0] & fact_of[1]
    assert all({"trained", "untrained"} <= {task.id.split("-")[0] for task in part} for part in (label, evaluation))
    archive = read_archive(1)
    assert {task.gold[0] for task in together if "trained" in task.id} == {
        fact.value for fact in archive.trained + archive.untrained
    }
    assert set(facts.values()) == {fact.value for fact in archive.facts}
    assert {len(task.tools) for task in evaluation} == {2, 4}
