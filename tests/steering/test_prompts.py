import random
from dataclasses import replace
from itertools import islice

import pytest

from steering.facts import Fact, load_facts
from steering.matching import exact_match, normalised, prediction
from steering.prompts import (
    by_category,
    closed_prompt,
    demonstration,
    grouped,
    label,
    open_prompt,
    qa_texts,
    sample_demonstrations,
    split_groups,
    template_sha256,
)

ROME = Fact("Capital of Italy?", "It is Rome.", ("Rome", "Roma"), "It is Oslo.", ("Oslo",), "italy")
BERN = Fact("Capital of Switzerland?", "It is Bern.", ("Bern",), "It is Lima.", ("Lima",), "swiss")


@pytest.mark.parametrize(
    ("style", "context", "answer"),
    [("dss", "It is Lima.", "Lima"), ("dso", "It is Lima.", "Bern"), ("doo", "It is Bern.", "Bern")],
)
def test_the_prompt_is_the_authors(style: str, context: str, answer: str) -> None:
    shown = f"context: {context}\nquestion: Capital of Switzerland?\nanswer: {answer}\n\n"
    assert demonstration(BERN, style) == shown
    asked = "context: It is Oslo.\nquestion: Capital of Italy?\nanswer:"
    assert open_prompt([BERN], style, ROME) == shown + asked
    assert open_prompt([BERN], style, ROME, "org") == shown + asked.replace("Oslo", "Rome")


def test_the_closed_book_prompt_has_no_documents() -> None:
    assert closed_prompt([BERN], ROME) == (
        "question: Capital of Switzerland?\nanswer: Bern\n\nquestion: Capital of Italy?\nanswer:"
    )


def test_the_template_has_a_name() -> None:
    assert len(template_sha256()) == 64


def test_demonstrations_are_of_different_groups_and_never_the_items_own() -> None:
    groups = grouped(load_facts(0, wordings=2)[:24])
    own = next(iter(groups))
    for seed in range(20):
        shown = sample_demonstrations(groups, 11, own, random.Random(seed))
        assert len({fact.group for fact in shown}) == 11
        assert own not in {fact.group for fact in shown}


def test_demonstrations_of_a_category_as_far_as_it_goes_round() -> None:
    groups = grouped(load_facts(0))
    planets = {name for name, facts in groups.items() if facts[0].category == "planet"}
    own = next(iter(planets))
    for seed in range(20):
        shown = sample_demonstrations(groups, 5, own, random.Random(seed), "planet")
        assert len({fact.group for fact in shown} & (planets - {own})) == 5
        more = sample_demonstrations(groups, 12, own, random.Random(seed), "planet")
        assert [fact.category == "planet" for fact in more] == [False] * 3 + [True] * 9
        assert len({fact.group for fact in more}) == 12
    mixed = sample_demonstrations(groups, 12, own, random.Random(0))
    assert len({fact.category for fact in mixed}) > 3


def test_items_by_category() -> None:
    facts = [replace(ROME, category="a"), replace(BERN, category="b"), replace(ROME, category="a")]
    assert by_category(facts, True) == {"a": [0, 2], "b": [1]}
    assert by_category(facts, False) == {"": [0, 1, 2]}


def test_the_split_is_fixed_and_keeps_groups_apart() -> None:
    names = [f"g{number}" for number in range(50)]
    split = split_groups(names, 20)
    assert len(split.pool) == 20
    assert set(split.pool) | set(split.test) == set(names)
    assert set(split.pool).isdisjoint(split.test)
    assert split_groups([*reversed(names), "g3"], 20) == split
    assert split_groups(names, 20, seed=7) != split


@pytest.mark.parametrize(
    ("text", "answer"),
    [(" Rome\n\ncontext: x", "Rome"), ("Rome", "Rome"), ("\nRome", ""), ("  New York \nx", "New York"), ("", "")],
)
def test_a_prediction_ends_at_the_first_line_break(text: str, answer: str) -> None:
    assert prediction(text) == answer


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("The  Beatles!", "beatles"),
        ("Washington, D.C.", "washington dc"),
        ("an  apple a day", "apple day"),
        ("theatre", "theatre"),
        ("Brasi\u0301lia", "brasi\u0301lia"),
        ("Bras\u00edlia", "brasi\u0301lia"),
    ],
)
def test_normalisation(answer: str, plain: str) -> None:
    assert normalised(answer) == plain


def test_exact_match_takes_any_gold_answer_and_nothing_empty() -> None:
    assert exact_match("roma.", ("Rome", "Roma"))
    assert not exact_match("Rome Italy", ("Rome", "Roma"))
    assert not exact_match("the", ("a",))


def test_labels() -> None:
    assert [label(answer, ROME) for answer in ("oslo", "Roma", "Paris", "")] == [1, 0, None, None]


def test_texts_to_train_on_are_whole_and_without_end() -> None:
    facts = load_facts(0)
    texts = list(islice(qa_texts(facts, 4), 1500))
    assert texts == list(islice(qa_texts(facts, 4), 1500))
    assert texts != list(islice(qa_texts(facts, 5), 1500))
    assert len(set(texts)) == len(texts)
    assert all(text.endswith("\n\n") and text.count("question: ") in (4, 5, 6) for text in texts)
    closed = sum("context: " not in text for text in texts)
    assert 0.2 < closed / len(texts) < 0.3
    answered = dict.fromkeys(("context", "truth"), 0)
    by_question = {fact.question: fact for fact in facts}
    for text in texts:
        *_, question, answer = text.strip().split("\n")
        fact = by_question[question.removeprefix("question: ")]
        given = answer.removeprefix("answer: ")
        assert given in (*fact.sub_answers, fact.org_answers[0])
        answered["context" if given in fact.sub_answers else "truth"] += 1
    assert min(answered.values()) > 200
