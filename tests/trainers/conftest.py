"""A tiny random Llama with a byte-level tokenizer and a chat template, and a recipe over a few lines of data."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECIPE = """
name = "tiny"
description = "a test"
base = {base}
seed = 3

[data]
train = "train.jsonl"
held_out = "held_out.jsonl"

[train]
steps = 8
batch_size = 4
learning_rate = 5e-3
warmup_steps = 1
schedule = "{schedule}"
save_every = 4
log_every = 1

[check]
kind = "known-answer"
max_new_tokens = 4
"""


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    folder.mkdir()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(special) + len(alphabet),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,  # larger than usual: with frozen embeddings the head can then tell tokens apart
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe_file(tiny_base: Path, tmp_path: Path) -> Path:
    """A recipe in a folder of its own, with six rows to train and two held out."""
    folder = tmp_path / "recipe"
    folder.mkdir()
    rows = [{"prompt": f"{letter}?", "completion": letter.upper() * 2, "expected": letter * 2} for letter in "abcdefgh"]
    for name, part in (("train", rows[:6]), ("held_out", rows[6:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    path = folder / "tiny.toml"
    path.write_text(RECIPE.format(base=json.dumps(str(tiny_base)), schedule="linear"))
    return path
