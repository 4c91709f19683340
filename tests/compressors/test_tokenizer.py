"""A fine-tune's own tokenizer: carried as a difference, rebuilt whole, and refused where its tokens clash with the base's."""

import hashlib
import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from compressors import line_delta
from compressors.artifact import Artifact
from compressors.base import default_base
from compressors.compress import compress
from compressors.decompress import decompress
from compressors.errors import ArtifactError, BaseMismatchError, BudgetError, CheckpointError
from compressors.fingerprint import fingerprint, stored_tensors
from compressors.impart import ImPartConfig
from compressors.inspect import summary, text
from compressors.merge import MergeConfig, merge
from compressors.peft import import_lora
from compressors.tokenizer import VOCABULARY, array_key, canonical, clashing, digest, own_tokenizer, rebuilt, vocabulary
from compressors.verify import Report, verify
from compressors.writer import ArtifactWriter
from tests.compressors.conftest import base_tensors, tuned_tensors
from tests.compressors.lora_folder import write_lora

TABLE = "model.embed_tokens.weight"
lines = st.lists(st.text(alphabet="ab\n", max_size=4), max_size=12).map("\n".join)


def write_tokenizer(folder: Path, words: dict[str, int], special: tuple[str, ...] = ("<end>",)) -> None:
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    stored = json.loads(tokenizer.to_str())
    stored["model"]["vocab"] = words  # the library keeps one token an id
    (folder / VOCABULARY).write_text(json.dumps(stored))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))


WORDS = {word: number for number, word in enumerate(["?", "<end>", "<spare>", "the", "fox", "jumps"])}


@pytest.fixture
def base(checkpoint: Callable[..., Path]) -> Path:
    folder = checkpoint("base", base_tensors(), vocab_size=40, eos_token_id=1)
    write_tokenizer(folder, WORDS, ("<end>", "<spare>"))
    return folder


@pytest.fixture
def tune(checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """tune("name", words, special, rows): projections and added rows trained, with a tokenizer."""

    def write(
        name: str, words: dict[str, int], special: tuple[str, ...] = ("<end>", "<spare>"), rows: int = 42
    ) -> Path:
        tensors = tuned_tensors()
        tensors[TABLE] = torch.cat([tensors[TABLE], torch.ones(rows - 40, 48)])
        folder = checkpoint(name, tensors, vocab_size=rows, eos_token_id=1)
        write_tokenizer(folder, words, special)
        return folder

    return write


def made(base: Path, folder: Path) -> Path:
    out = folder.with_suffix(".safetensors")
    compress(base, folder, out, ImPartConfig(ratio=4.0))
    return out


def verified(path: Path, base: Path) -> Report:
    shapes = {name: tensor.shape for name, tensor in stored_tensors(base).items()}
    return verify(path, fingerprint(base), shapes, base)


GROWN = WORDS | {"<act>": 40, "quickly": 41}


# The difference of two texts


@settings(deadline=None)
@given(lines, lines)
def test_a_text_comes_back_from_its_difference_to_any_other(one: str, other: str):
    assert line_delta.decode(line_delta.encode(one, other), other) == one
    assert line_delta.decode(line_delta.encode(one)) == one


@pytest.mark.parametrize(
    "operations", [[[0, 9]], [[-1, 1]], [[0, 0]], [[0]], [3], {}, [[0, True]], [None], [["a", "b"]]]
)
def test_operations_that_do_not_fit_are_refused(operations: object):
    with pytest.raises(ArtifactError):
        line_delta.decode(zlib.compress(json.dumps(operations).encode()), "a\nb")


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_refused(data: bytes):
    with pytest.raises(ArtifactError):
        line_delta.decode(data, "a\nb")


def test_a_text_that_would_not_end_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(line_delta, "MAX_TEXT_BYTES", 1 << 16)
    many = json.dumps([[0, 2]] * 4000).encode()
    with pytest.raises(ArtifactError, match="more than"):
        line_delta.decode(zlib.compress(many), "x" * 100 + "\ny")
    with pytest.raises(ArtifactError, match="more than"):
        line_delta.decode(zlib.compress(b" " * (1 << 20)))


# What travels


@pytest.mark.slow
def test_two_tokens_added_to_a_real_tokenizer_take_a_kilobyte(tmp_path: Path):
    """Saved anew by transformers, which writes other files than the base has."""
    real = default_base(progress=False)
    tokenizer = AutoTokenizer.from_pretrained(real)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|act|>"]})
    tokenizer.add_tokens(["Oosterscheldekering"])
    tokenizer.save_pretrained(tmp_path)
    ours, theirs = ((folder / VOCABULARY).read_text(encoding="utf-8") for folder in (real, tmp_path))
    known, own = canonical(VOCABULARY, ours), canonical(VOCABULARY, theirs)
    assert len(line_delta.encode(own, known)) < 1024
    assert json.loads(own)["added_tokens"][-1]["content"] == "Oosterscheldekering"
    assert clashing(vocabulary(known), vocabulary(own), 49154) is None
    assert "Oosterscheldekering" in str(clashing(vocabulary(known), vocabulary(own), 49153))


def test_a_tokenizer_travels_with_the_delta_and_comes_back(base: Path, tune: Callable[..., Path], tmp_path: Path):
    delta = made(base, tune("tune", GROWN, ("<act>", "<end>", "<spare>")))
    report = verified(delta, base)
    assert report.added_tokens == 2
    assert "tokenizer" in report.checks
    assert report.manifest.format_version == 3
    assert report.manifest.tokenizer.eos_token_id == [1, 40]  # that of the configuration, and that of the tokenizer
    with Artifact.open(delta) as artifact:
        found = rebuilt(artifact, base)
        page = text(summary(artifact))
    assert found[VOCABULARY] == canonical(VOCABULARY, (tmp_path / "tune" / VOCABULARY).read_text())
    assert "its own: tokenizer.json, tokenizer_config.json" in page
    decompress(delta, base, tmp_path / "whole", "fp32")
    for folder in ("whole", "tune"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert tokenizer.encode("the fox jumps quickly <act>") == [3, 4, 5, 41, 40]
        assert tokenizer.eos_token == "<act>"


def test_a_tokenizer_that_says_the_same_does_not_travel(base: Path, tune: Callable[..., Path]):
    """Saved anew, in another order, with how the last batch was padded."""
    folder = tune("tune", dict(reversed(WORDS.items())))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    stored = json.loads((folder / VOCABULARY).read_text()) | {
        "truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    }
    (folder / VOCABULARY).write_text(json.dumps(stored))
    manifest = verified(made(base, folder), base).manifest
    assert (manifest.tokenizer.files, digest(manifest.tokenizer), manifest.format_version) == ({}, "", 2)
    assert manifest.tokenizer.eos_token_id == 1


@pytest.mark.slow
def test_a_tokenizer_that_was_saved_anew_is_told_without_loading_it(tmp_path: Path):
    """transformers writes a post processor that does nothing, and another class; loading both takes as long as all matrices."""
    base = default_base()
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    assert (tmp_path / VOCABULARY).read_bytes() != (base / VOCABULARY).read_bytes()
    script = (
        "import sys; from pathlib import Path; from compressors.tokenizer import own_tokenizer; "
        "found = own_tokenizer(Path(sys.argv[1]), Path(sys.argv[2]), None, None); "
        "print(len(found.files), 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script, base, tmp_path], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["0", "False"]
    stored = json.loads((tmp_path / VOCABULARY).read_text())
    stored["normalizer"] = {"type": "Lowercase"}
    (tmp_path / VOCABULARY).write_text(json.dumps(stored))
    assert set(own_tokenizer(base, tmp_path, None, None).files) >= {VOCABULARY}


def test_rows_without_tokens_and_a_renamed_special_token_are_no_clash(base: Path, tune: Callable[..., Path]):
    renamed = {word: number for word, number in WORDS.items() if word != "<spare>"} | {"<act>": 2}
    report = verified(made(base, tune("tune", renamed, ("<end>", "<act>"), rows=64)), base)
    assert report.added_tokens == 24
    assert report.manifest.tokenizer.files


# What clashes

CLASHES = {
    "id of another token": (WORDS | {"<act>": 4}, ("<end>",), "'<act>' has id 4, which is 'fox' in the base"),
    "same string, other id": (WORDS | {"fox": 40}, ("<end>",), "'fox' has id 40, and 4 in the base"),
    "beyond the tables": (
        WORDS | {"<act>": 42},
        ("<end>",),
        "'<act>' has id 42, and the vocabulary tables have 42 rows",
    ),
    "two tokens, one id": (WORDS | {"<act>": 41, "<ask>": 41}, ("<end>",), "both have id 41"),
}


@pytest.mark.parametrize(("words", "special", "told"), CLASHES.values(), ids=CLASHES)
def test_a_clash_is_named_when_it_is_compressed(
    base: Path, tune: Callable[..., Path], tmp_path: Path, words, special, told
):
    with pytest.raises(CheckpointError, match=told):
        made(base, tune("tune", words, special))
    assert not (tmp_path / "tune.safetensors").exists()


@pytest.mark.parametrize(("words", "special", "told"), CLASHES.values(), ids=CLASHES)
def test_a_clash_is_named_when_the_file_is_checked(
    base: Path, tune: Callable[..., Path], tmp_path: Path, words, special, told
):
    (tmp_path / "bad").mkdir()
    write_tokenizer(tmp_path / "bad", words, special)
    bad = canonical(VOCABULARY, (tmp_path / "bad" / VOCABULARY).read_text())
    delta = made(base, tune("tune", GROWN))
    replaced(delta, bad)
    with pytest.raises(ArtifactError, match=told):
        verified(delta, base)


def replaced(path: Path, text: str) -> None:
    """Another tokenizer.json in a delta file, which is sealed as if it had been written so."""
    with Artifact.open(path) as artifact:
        arrays = {key: artifact.array(key).copy() for key in artifact.slots}
        manifest = artifact.manifest
    data = line_delta.encode(text)
    file = manifest.tokenizer.files[VOCABULARY].model_copy(
        update={
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "against": None,
            "stored": hashlib.sha256(data).hexdigest(),
        }
    )
    told = manifest.tokenizer.model_copy(update={"files": manifest.tokenizer.files | {VOCABULARY: file}})
    with ArtifactWriter(path) as writer:
        for key, array in arrays.items():
            writer.add(
                key,
                torch.frombuffer(bytearray(data), dtype=torch.uint8).numpy() if key == array_key(VOCABULARY) else array,
            )
        writer.finish(manifest.model_copy(update={"tokenizer": told}), 1)


@pytest.mark.parametrize(
    "text", ["[]", '{"model": {}}', '{"model": {"vocab": {"a": "b"}}, "added_tokens": []}', "no JSON"]
)
def test_a_file_that_is_no_tokenizer_is_refused(base: Path, tune: Callable[..., Path], text: str):
    delta = made(base, tune("tune", GROWN))
    replaced(delta, text)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        verified(delta, base)


def test_damage_and_another_tokenizer_of_the_base_are_told_apart(base: Path, tune: Callable[..., Path]):
    delta = made(base, tune("tune", GROWN))
    with Artifact.open(delta) as artifact:
        at = artifact.slots[array_key(VOCABULARY)].start
    whole = delta.read_bytes()
    delta.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ArtifactError, match="do not match their digest"):
        verify(delta)
    delta.write_bytes(whole)
    write_tokenizer(base, WORDS | {"lazy": 6}, ("<end>", "<spare>"))
    with pytest.raises(BaseMismatchError, match=r"its base's tokenizer\.json"):
        verified(delta, base)


def test_tables_must_grow_together(base: Path, tune: Callable[..., Path]):
    folder = tune("tune", GROWN)
    for model, rows in ((base, 40), (folder, 41)):
        file = model / "model.safetensors"
        save_file(load_file(file) | {"lm_head.weight": torch.randn(rows, 48)}, file)
    delta = made(base, folder)
    with pytest.raises(ArtifactError, match=r"1 to lm_head\.weight, 2 to model\.embed_tokens\.weight"):
        verified(delta, base)


# Merged, and from a LoRA


def test_merging_keeps_one_tokenizer_and_refuses_two(base: Path, tune: Callable[..., Path], tmp_path: Path):
    one, same = made(base, tune("one", GROWN)), made(base, tune("same", GROWN))
    other = made(base, tune("other", WORDS | {"<act>": 40, "slowly": 41}))
    out = tmp_path / "out.safetensors"
    assert merge([one, same], base, out, MergeConfig(weights=(0.5, 0.5))).format_version == 3
    with Artifact.open(one) as first, Artifact.open(out) as both:
        assert rebuilt(both, base) == rebuilt(first, base)
    with pytest.raises(BudgetError, match="a different tokenizer; say whose to take with --tokenizer-of"):
        merge([one, other], base, out, MergeConfig())
    merge([one, other], base, out, MergeConfig(), tokenizer_of=other)
    with Artifact.open(other) as second, Artifact.open(out) as both:
        assert rebuilt(both, base) == rebuilt(second, base)
    assert verified(out, base).added_tokens == 2


def test_a_lora_brings_its_tables_tokenizer_and_template(base: Path, tmp_path: Path):
    table = torch.cat([base_tensors()[TABLE], torch.ones(2, 48)])
    folder = write_lora(
        tmp_path / "lora", {TABLE: table, "lm_head.weight": table.clone()}, modules_to_save=["embed_tokens"]
    )
    write_tokenizer(folder, GROWN)
    (folder / "chat_template.jinja").write_text("own")
    import_lora(folder, base, tmp_path / "lora.safetensors")
    report = verified(tmp_path / "lora.safetensors", base)
    told = report.manifest.tokenizer
    assert (report.added_tokens, told.vocab_size, told.chat_template) == (2, 42, "own")
    assert VOCABULARY in told.files
