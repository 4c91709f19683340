"""Base and fine-tune folders in, one delta file out: matrix by matrix, with as many in memory as there are threads.

Every matrix is decomposed by one thread, so the number of threads does not change the bytes of the file. They are the same on
the same build of torch and kind of CPU; another BLAS may round the last bit of a singular vector differently.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from compressors.artifact import Manifest, Ratios, Record, TokenizerInfo
from compressors.encode import encode_raw, encode_rows
from compressors.fingerprint import fingerprint
from compressors.layout import Part, is_embedding, projection_parts
from compressors.methods import Config, encode_projection
from compressors.pairing import matched_names, tied_to
from compressors.ratios import Tally
from compressors.record import Encoded
from compressors.tensors import Checkpoint, one_thread_per_operation
from compressors.writer import ArtifactWriter

Task = Callable[[], Encoded]


def compress(
    base: Path, fine_tune: Path, out: Path, config: Config, name: str | None = None, progress: bool = False
) -> Manifest:
    """Compress `fine_tune` - `base` into the file `out`. Raises CheckpointError, BudgetError; `out` is whole or absent.

    `name` is written into the manifest as the base's name, for people; identity is the fingerprint.
    """
    with Checkpoint(base) as old, Checkpoint(fine_tune) as new, ArtifactWriter(out) as writer:
        tasks = _tasks(old, new, config)
        records, tally = {}, Tally()
        with one_thread_per_operation() as workers:
            done = in_order(tasks, workers)
            for encoded in tqdm(done, "compressing", total=len(tasks), unit="matrix", disable=not progress):
                records[encoded.name] = store(writer, encoded)
                tally.add(encoded.name, encoded.shape, encoded.tied_to is not None, encoded.arrays)
        manifest = Manifest(
            method=config.method,
            base_fingerprint=fingerprint(base),
            base_name=name or base.name,
            architecture=str(next(iter(new.config.get("architectures") or []), "unknown")),
            mask="seeded",
            **settings(config),
            ratios=Ratios(values=tally.values_ratio, projection_bytes=tally.bytes_ratio, whole_file=None),
            tokenizer=_tokenizer_info(old, new),
            tool=f"deltaworks {importlib.metadata.version('deltaworks')}",
            tensors=records,
        )
        return writer.finish(manifest, tally.dense_bytes)


def settings(config: Config | None) -> dict[str, Any]:
    """The settings of the manifest; those that the method does not have are None, and the seed 0; no method has none."""
    names = ("ratio", "bytes_ratio", "beta", "c", "rule", "rescale", "value_dtype")
    found = {name: getattr(config, name, None) for name in names}
    if found["bytes_ratio"] is not None:
        found["ratio"] = None
    return {**found, "seed": getattr(config, "seed", 0)}


def _tasks(old: Checkpoint, new: Checkpoint, config: Config) -> list[Task]:
    """One task per matrix or other parameter, in the order of the file. Raises CheckpointError before any is run."""
    tasks: list[Task] = []
    for name in matched_names(old, new):
        if table := tied_to(old, new, name):
            tasks.append(partial(Encoded, name, "zero", new.shape(table), tied_to=table))
        elif parts := projection_parts(name, new.shape(name), old.config):
            tasks += [partial(_projection, old, new, name, part, config) for part in parts]
        else:
            tasks.append(partial(_other, old, new, name, config.rows_dtype))
    return tasks


def _projection(old: Checkpoint, new: Checkpoint, name: str, part: Part, config: Config) -> Encoded:
    delta = new.finite(name, part).float() - old.finite(name, part).float()
    return encode_projection(part.name, delta, config)


def _other(old: Checkpoint, new: Checkpoint, name: str, rows_dtype: str) -> Encoded:
    before, after = old.tensor(name), new.tensor(name)
    if not new.is_floating(name) and torch.equal(before, after):  # a table of positions, or the like
        return Encoded(name, "zero", tuple(after.shape))
    if is_embedding(name):
        return encode_rows(name, old.finite(name), new.finite(name), rows_dtype)
    return encode_raw(name, old.finite(name), new.finite(name))


def in_order(tasks: Iterable[Task], workers: int) -> Iterator[Encoded]:
    """Results in the order of the tasks, with at most `workers` of them under way or waiting."""
    waiting: deque[Future[Encoded]] = deque()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for task in tasks:
                if len(waiting) == workers:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(task))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def store(writer: ArtifactWriter, encoded: Encoded) -> Record:
    """Append the arrays of `encoded`; its record."""
    digests = {
        key: writer.add(f"{encoded.name}::{key}", array, bf16=array.dtype == np.uint16)
        for key, array in encoded.arrays.items()
    }
    return Record(
        kind=encoded.kind,
        shape=encoded.shape,
        rank=encoded.rank,
        tied_to=encoded.tied_to,
        mask=encoded.mask,
        bits=encoded.bits,
        sha256=digests,
    )


def _tokenizer_info(old: Checkpoint, new: Checkpoint) -> TokenizerInfo:
    text = _chat_template(new)
    return TokenizerInfo(
        vocab_size=new.config.get("vocab_size"),
        eos_token_id=new.config.get("eos_token_id"),
        chat_template_sha256=hashlib.sha256(text.encode()).hexdigest() if text is not None else None,
        chat_template=None if text == _chat_template(old) else text,
    )


def _chat_template(checkpoint: Checkpoint) -> str | None:
    file = checkpoint.folder / "chat_template.jinja"
    text: Any = file.read_text(encoding="utf-8") if file.is_file() else checkpoint.tokenizer().get("chat_template")
    return text if isinstance(text, str) else None
