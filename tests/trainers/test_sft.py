"""Fine-tuning end to end on a tiny model: what changes, what does not, and that an interruption leaves no trace."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from trainers.collate import SharedPrefixCollator
from trainers.errors import DataError, RunError
from trainers.recipe import load_recipe
from trainers.rows import Row
from trainers.sft import PROJECTION, freeze, step_order, train_sft
from trainers.tokens import IGNORED, TokenRow, tokenize_row


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _losses(record: dict[str, object]) -> list[float]:
    return [float(entry["loss"]) for entry in record["losses"]]  # type: ignore[attr-defined]  # a record is plain JSON


@pytest.mark.slow
def test_loss_falls_and_only_projections_change(recipe_file: Path, tiny_base: Path, tmp_path: Path) -> None:
    run = train_sft(load_recipe(recipe_file), recipe_file.parent, tmp_path / "run")
    losses = _losses(run.record)
    assert len(losses) == 8
    assert losses[-1] < 0.7 * losses[0]
    base, tuned = load_file(tiny_base / "model.safetensors"), load_file(run.model / "model.safetensors")
    assert set(base) == set(tuned)
    for name, weight in base.items():
        assert tuned[name].dtype == torch.float32
        changed = not torch.equal(tuned[name], weight.float())
        assert changed == bool(PROJECTION.search(name)), name
        assert changed == (not torch.equal(tuned[name], tuned[name].bfloat16().float())), (
            "saved as trained, not rounded"
        )
    assert (run.model / "chat_template.jinja").read_bytes() == (tiny_base / "chat_template.jinja").read_bytes()
    AutoModelForCausalLM.from_pretrained(run.model)


@pytest.mark.slow
def test_products_in_bf16_train_fp32_weights(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file)
    train = recipe.train.model_copy(update={"precision": "bf16", "steps": 4})
    run = train_sft(recipe.model_copy(update={"train": train}), recipe_file.parent, tmp_path / "run")
    plain = train_sft(
        recipe.model_copy(update={"train": train.model_copy(update={"precision": "fp32"})}),
        recipe_file.parent,
        tmp_path / "plain",
    )
    close, exact = _losses(run.record), _losses(plain.record)
    assert close != exact
    assert close == pytest.approx(exact, rel=0.02)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(run.model / "model.safetensors").values())


@pytest.mark.slow
def test_run_json_is_enough_to_repeat_the_run(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file)
    train_sft(recipe, recipe_file.parent, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["recipe"] == recipe.model_dump(mode="json")
    assert record["base_fingerprint"].startswith("sha256:")
    assert set(record["data_sha256"]) == {"train", "held_out"}
    assert record["rows"] == {"train": 6, "held_out": 2}
    assert {"python", "torch", "trl", "transformers"} <= set(record["versions"])
    assert {"cpu", "cores", "torch_threads", "memory_nbytes", "gpu"} == set(record["hardware"])
    assert record["trained_parameters"] > 0
    assert record["wall_s"] > 0
    assert [entry["step"] for entry in record["losses"]] == list(range(1, 9))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(recipe_file)
    whole = train_sft(recipe, recipe_file.parent, tmp_path / "whole")
    _count_steps(monkeypatch, interrupt_at=6)
    with pytest.raises(KeyboardInterrupt):
        train_sft(recipe, recipe_file.parent, tmp_path / "broken")
    monkeypatch.undo()
    assert not (tmp_path / "broken" / "model").exists()
    taken = _count_steps(monkeypatch)
    resumed = train_sft(recipe, recipe_file.parent, tmp_path / "broken", resume=True)
    assert taken == [4, 5, 6, 7]  # the last checkpoint holds the first four steps
    assert _losses(resumed.record) == _losses(whole.record)
    expected, found = (load_file(run.model / "model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    again = train_sft(recipe, recipe_file.parent, tmp_path / "broken", resume=True)
    assert again.record == resumed.record


def _count_steps(monkeypatch: pytest.MonkeyPatch, interrupt_at: int = 0) -> list[int]:
    """A list that grows with every step taken; Ctrl-C in the `interrupt_at`-th. Nothing else in the loop is changed."""
    taken: list[int] = []
    compute_loss = SFTTrainer.compute_loss

    def counted(self: SFTTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        taken.append(self.state.global_step)
        if len(taken) == interrupt_at:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", counted)
    return taken


def test_another_run_in_the_folder_is_left_alone(recipe_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "plan.json").write_text(json.dumps({"recipe": {}, "base_fingerprint": "sha256:0", "data_sha256": {}}))
    with pytest.raises(RunError, match="already holds a run"):
        train_sft(load_recipe(recipe_file), recipe_file.parent, output)
    with pytest.raises(RunError, match="another run"):
        train_sft(load_recipe(recipe_file), recipe_file.parent, output, resume=True)


def test_a_shared_prefix_gives_the_loss_and_gradient_of_separate_rows(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    freeze(model, "projections")
    rows = [tokenize_row(tokenizer, Row(text, text.upper()), 99) for text in ("hello", "hi", "what now", "what else")]
    batch = SharedPrefixCollator()([vars(row) for row in rows])
    count = sum(label != IGNORED for row in rows for label in row.labels)
    assert batch["input_ids"].shape[1] < sum(len(row.input_ids) for row in rows)
    assert int((batch["labels"] != IGNORED).sum()) == count

    def backward(loss: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    shared = _loss_sum(model, **batch) / count
    separate = (
        sum(
            _loss_sum(model, input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])) for row in rows
        )
        / count
    )
    torch.testing.assert_close(shared, separate, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(backward(shared), backward(separate), rtol=1e-4, atol=1e-6)


def _loss_sum(model: torch.nn.Module, **batch: torch.Tensor) -> torch.Tensor:
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED
    )


def test_rows_are_rendered_as_the_chat_template_does_and_never_cut(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    row = tokenize_row(tokenizer, Row("hi", "yes"), 99)
    prompt = "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row.input_ids) == prompt + "yes<|im_end|>"
    assert tokenizer.decode([label for label in row.labels if label != IGNORED]) == "yes<|im_end|>"
    with pytest.raises(DataError, match="max_length"):
        tokenize_row(tokenizer, Row("hi", "yes"), len(row.input_ids) - 1)


def test_every_row_comes_once_an_epoch(recipe_file: Path) -> None:
    train = load_recipe(recipe_file).train
    order = step_order(16, train, seed=1)
    assert sorted(order) == sorted([*range(16), *range(16)])
    assert order == step_order(16, train, seed=1) != step_order(16, train, seed=2)


def test_batches_of_one_system_prompt_leave_no_row_out(recipe_file: Path) -> None:
    train = load_recipe(recipe_file).train  # 8 steps of 4 rows
    groups = ["plain"] * 11 + ["tools"] * 5
    order = step_order(16, train, seed=1, groups=groups)
    assert order == step_order(16, train, seed=1, groups=groups)
    batches = [order[start : start + 4] for start in range(0, len(order), 4)]
    assert len(batches) == 8
    assert all(len({groups[row] for row in batch}) == 1 for batch in batches)
    assert set(order) == set(range(16))


def test_rows_without_a_common_beginning_are_packed_too() -> None:
    rows = [TokenRow([1, 2, 3], [IGNORED, 2, 3]), TokenRow([4, 5], [IGNORED, 5])]
    batch = SharedPrefixCollator()([vars(row) for row in rows])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3, IGNORED, 5]]
    assert batch["attention_mask"][0, 0].tolist()[3] == [False, False, False, True, False]


def test_rows_of_one_system_prompt_share_it_beside_others(tiny_base: Path) -> None:
    def chat(system: str, word: str) -> Row:
        messages = ({"role": "system", "content": system}, {"role": "user", "content": word})
        return Row(word, word.upper(), messages=messages)

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    asked = [chat("one", "a"), chat("two", "bc"), chat("one", "d"), chat("two", "e"), chat("three", "f")]
    rows = [tokenize_row(tokenizer, row, 99) for row in asked]
    batch = SharedPrefixCollator(tokenizer.eos_token_id)([vars(row) for row in rows])
    assert batch["input_ids"].shape[1] < sum(len(row.input_ids) for row in rows) - 30
    separate = sum(
        _loss_sum(model, input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])) for row in rows
    )
    torch.testing.assert_close(_loss_sum(model, **batch), separate, rtol=1e-5, atol=1e-5)
    one = SharedPrefixCollator(tokenizer.eos_token_id)([vars(row) for row in rows[::2][:2]])
    plain = SharedPrefixCollator()([vars(row) for row in rows[::2][:2]])
    assert all(torch.equal(one[key], plain[key]) for key in plain)
