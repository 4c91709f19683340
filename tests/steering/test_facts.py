import json
from collections import Counter
from pathlib import Path

import pytest

from steering.errors import SteeringError
from steering.facts import MACNOISE_ITEMS, load_facts, load_macnoise, load_nq_swap, open_facts
from steering.matching import normalised

ITEM = {
    "question": "who sang it",
    "org_context": "Ann sang it.",
    "org_answer": ["Ann", "Ann B."],
    "sub_context": "Bob sang it.",
    "sub_answer": ["Bob"],
}


def write(path: Path, *items: object) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_the_set_is_large_and_every_group_is_its_own() -> None:
    facts = load_facts(0)
    assert len(facts) >= 450
    assert len({fact.group for fact in facts}) == len({fact.question for fact in facts}) == len(facts)
    assert len({fact.category for fact in facts}) >= 20
    assert all(fact.group.startswith(f"{fact.category}: ") for fact in facts)


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_the_documents_answers_contradict_each_other(seed: int) -> None:
    for fact in load_facts(seed):
        golds = {normalised(answer) for answer in fact.org_answers}
        assert "" not in golds
        assert golds.isdisjoint(normalised(answer) for answer in fact.sub_answers), fact
        assert fact.org_answers[0].lower() in fact.org_context.lower()
        assert fact.sub_answers[0].lower() in fact.sub_context.lower()
        assert "{" not in fact.question + fact.org_context + fact.sub_context


def test_the_counterfactual_is_an_answer_of_the_same_category() -> None:
    facts = load_facts(3)
    of_category: dict[str, set[str]] = {}
    for fact in facts:
        of_category.setdefault(fact.group.split(":")[0], set()).add(fact.org_answers[0])
    assert all(fact.sub_answers[0] in of_category[fact.group.split(":")[0]] for fact in facts)


def test_documents_differ_in_nothing_but_the_answer() -> None:
    for fact in load_facts(5):
        swapped = fact.org_context.lower().replace(fact.org_answers[0].lower(), fact.sub_answers[0].lower())
        if fact.org_context.lower().count(fact.org_answers[0].lower()) == 1:
            assert swapped == fact.sub_context.lower()


def test_the_seed_decides_the_counterfactuals() -> None:
    one, same, other = load_facts(1), load_facts(1), load_facts(2)
    assert one == same
    assert [fact.question for fact in one] == [fact.question for fact in other]
    assert sum(a.sub_answers != b.sub_answers for a, b in zip(one, other, strict=True)) > len(one) / 2


def test_a_second_wording_stays_in_its_group() -> None:
    facts = load_facts(1, wordings=2)
    assert set(Counter(fact.group for fact in facts).values()) == {2}
    assert len({fact.question for fact in facts}) == len(facts)
    assert all(a.sub_answers == b.sub_answers for a, b in zip(facts[::2], facts[1::2], strict=True))
    with pytest.raises(SteeringError, match="wordings must be 1 to 2"):
        load_facts(1, wordings=3)


def test_nq_swap_is_read_and_grouped_by_question(tmp_path: Path) -> None:
    path = write(tmp_path / "nq.jsonl", ITEM, ITEM | {"org_context": "Of course Ann.", "sub_answer": "Bob"})
    first, second = load_nq_swap(path)
    assert (first.org_answers, first.sub_answers, second.sub_answers) == (("Ann", "Ann B."), ("Bob",), ("Bob",))
    assert first.group == second.group == "who sang it"
    assert open_facts(f"nqswap:{path}", seed=9) == [first, second]


def test_items_whose_answers_cannot_be_told_apart_are_left_out(tmp_path: Path) -> None:
    assert len(load_nq_swap(write(tmp_path / "nq.jsonl", ITEM, ITEM | {"sub_answer": ["the ann!"]}))) == 1


def test_macnoise_is_cut_where_the_authors_cut_it(tmp_path: Path) -> None:
    path = write(tmp_path / "mac.jsonl", *[ITEM] * (MACNOISE_ITEMS + 3))
    assert len(load_macnoise(path)) == len(open_facts(f"macnoise:{path}", 0)) == MACNOISE_ITEMS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"nq\.jsonl:2: not a JSON object"),
        ("[1]", r"nq\.jsonl:2: not a JSON object"),
        (json.dumps({"question": "q"}), r"nq\.jsonl:2: no field 'org_context'"),
        (json.dumps(ITEM | {"question": " "}), r"nq\.jsonl:2: question is not a text"),
        (json.dumps(ITEM | {"org_context": 3}), r"nq\.jsonl:2: org_context is not a text"),
        (json.dumps(ITEM | {"sub_answer": []}), r"nq\.jsonl:2: sub_answer is not a list of answers"),
        (json.dumps(ITEM | {"org_answer": ["the"]}), r"nq\.jsonl:2: org_answer is not a list of answers"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "nq.jsonl"
    path.write_text(json.dumps(ITEM) + "\n" + line + "\n")
    with pytest.raises(SteeringError, match=message):
        load_nq_swap(path)


def test_files_that_hold_no_facts(tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match="export the data set"):
        load_nq_swap(tmp_path / "dev.parquet")
    with pytest.raises(SteeringError, match="No such file"):
        load_nq_swap(tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SteeringError, match="not a UTF-8"):
        load_nq_swap(tmp_path / "binary.jsonl")
    with pytest.raises(SteeringError, match="no fact in it"):
        load_nq_swap(write(tmp_path / "empty.jsonl"))
    for source in ("nqswap:", "squad:x", "defaults"):
        with pytest.raises(SteeringError, match="facts are"):
            open_facts(source, 0)
