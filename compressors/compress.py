"""Base and fine-tune folders in, one delta file out: matrix by matrix, with as many in memory as there are threads.

Every matrix is decomposed by one thread, so the number of threads does not change the bytes of the file. They are the same on
the same build of torch and kind of CPU; another BLAS may round the last bit of a singular vector differently.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from compressors.artifact import Array, Manifest, Ratios, Record, TokenizerInfo, version_for
from compressors.baselines import BitDeltaConfig
from compressors.calibrate import calibrated
from compressors.calibration import Calibration
from compressors.distil import distilled
from compressors.encode import encode_raw, encode_rows
from compressors.errors import BudgetError
from compressors.fingerprint import fingerprint
from compressors.layout import Part, input_table, is_embedding, projection_parts
from compressors.mask_codes import code_of
from compressors.methods import Config, encode_projection
from compressors.pairing import matched_names, tied_to
from compressors.quantize import ImPartQtConfig
from compressors.ratios import Tally
from compressors.record import Encoded, as_record
from compressors.tensors import Checkpoint, one_thread_per_operation
from compressors.tokenizer import chat_template, own_tokenizer, with_end_token
from compressors.writer import ArtifactWriter

_AHEAD = 4  # tasks for each worker, under way, waiting for it or done

Task = Callable[[], list[Encoded]]  # one per output


def compress(
    base: Path,
    fine_tune: Path,
    out: Path,
    config: Config,
    name: str | None = None,
    progress: bool = False,
    calibration: Calibration | None = None,
) -> Manifest:
    """Compress `fine_tune` - `base` into the file `out`. Raises CheckpointError, BudgetError; `out` is whole or absent.

    `name` is written into the manifest as the base's name, for people; identity is the fingerprint. `calibration`, with one
    config alone: a text by whose activations ImPart-Qt rounds its values, or on which BitDelta's scales are distilled; the
    fine-tune is then in memory as a whole.
    """
    return compress_each(base, fine_tune, [(config, out)], name, progress, calibration)[0]


def compress_each(
    base: Path,
    fine_tune: Path,
    wanted: Sequence[tuple[Config, Path]],
    name: str | None = None,
    progress: bool = False,
    calibration: Calibration | None = None,
) -> list[Manifest]:
    """`compress` with several settings, into a file each: every matrix is read and decomposed once."""
    if calibration is None and any(getattr(config, "distil", 0) for config, _ in wanted):
        raise BudgetError("--distil needs a text: name one with --calibration")
    with Checkpoint(base) as old, Checkpoint(fine_tune) as new, ExitStack() as open_files:
        outputs = [_Output(config, open_files.enter_context(ArtifactWriter(out))) for config, out in wanted]
        names = matched_names(old, new)
        configs = [output.config for output in outputs]
        tasks = _tasks(old, new, configs, names if calibration is None else _without_projections(names, old, new))
        if calibration is not None:
            for encoded in _by_text(old, new, configs, calibration, progress):
                outputs[0].add(encoded)
        with one_thread_per_operation() as workers:
            done = in_order(tasks, workers)
            for each in tqdm(done, "compressing", total=len(tasks), unit="matrix", disable=not progress):
                for output, encoded in zip(outputs, each, strict=True):
                    output.add(encoded)
        common = {
            "base_fingerprint": fingerprint(base),
            "base_name": name or base.name,
            "architecture": str(next(iter(new.config.get("architectures") or []), "unknown")),
        }
        tokenizer, files = tokenizer_info(old, new.folder, new.config, vocabulary_rows(new))
        return [output.finish(tokenizer, files, common) for output in outputs]


class _Output:
    """A file in the making."""

    def __init__(self, config: Config, writer: ArtifactWriter) -> None:
        self.config = config
        self._writer = writer
        self._records: dict[str, Record] = {}
        self._tally = Tally()

    def add(self, encoded: Encoded) -> None:
        self._records[encoded.name] = store(self._writer, encoded)
        self._tally.add(encoded.name, encoded.shape, encoded.tied_to is not None, encoded.arrays)

    def finish(self, tokenizer: TokenizerInfo, files: Mapping[str, Array], common: dict[str, Any]) -> Manifest:
        """`files`: arrays of the fine-tune's own tokenizer."""
        tally = self._tally
        for key, array in files.items():
            self._writer.add(key, array)
        manifest = Manifest(
            format_version=version_for(tokenizer),
            tokenizer=tokenizer,
            method=self.config.method,
            mask=stored_mask(self.config),
            **settings(self.config),
            **common,
            ratios=Ratios(values=tally.values_ratio, projection_bytes=tally.bytes_ratio, whole_file=None),
            tool=f"deltaworks {importlib.metadata.version('deltaworks')}",
            tensors=self._records,
        )
        return self._writer.finish(manifest, tally.dense_bytes)


def _by_text(
    old: Checkpoint, new: Checkpoint, configs: Sequence[Config], calibration: Calibration, progress: bool
) -> Iterator[Encoded]:
    """All projections, by a method that needs a text for them."""
    (config,) = configs
    if isinstance(config, ImPartQtConfig):
        return calibrated(old, new, config, calibration, progress)
    if isinstance(config, BitDeltaConfig) and config.distil:
        return distilled(old, new, config, calibration, progress)
    raise BudgetError(f"a calibration belongs to the method impart-qt and to --distil, not to {config.method}")


def _without_projections(names: Iterable[str], old: Checkpoint, new: Checkpoint) -> list[str]:
    return [name for name in names if not projection_parts(name, new.shape(name), old.config)]


def settings(config: Config | None) -> dict[str, Any]:
    """The settings of the manifest; those that the method does not have are None, and the seed 0; no method has none."""
    names = ("ratio", "bytes_ratio", "beta", "c", "rule", "rescale", "value_dtype")
    found = {name: getattr(config, name, None) for name in names}
    if found["bytes_ratio"] is not None:
        found["ratio"] = None
    return {**found, "seed": getattr(config, "seed", 0), "distil": getattr(config, "distil", 0) or None}


def stored_mask(config: Config | None) -> str:
    """The manifest's mask: of records that name none."""
    return code_of(getattr(config, "mask", "auto")) or "seeded"


def _tasks(old: Checkpoint, new: Checkpoint, configs: Sequence[Config], names: Iterable[str]) -> list[Task]:
    """One task per matrix or other parameter, in the order of the names. Raises CheckpointError before any is run."""
    tasks: list[Task] = []
    for name in names:
        if table := tied_to(old, new, name):
            tasks.append(partial(_tied, name, new.shape(table), table, len(configs)))
        elif parts := projection_parts(name, new.shape(name), old.config):
            tasks += [partial(_projection, old, new, name, part, configs) for part in parts]
        else:
            tasks.append(partial(_other, old, new, name, [config.rows_dtype for config in configs]))
    return tasks


def _tied(name: str, shape: tuple[int, ...], table: str, count: int) -> list[Encoded]:
    return [Encoded(name, "zero", shape, tied_to=table)] * count


def _projection(old: Checkpoint, new: Checkpoint, name: str, part: Part, configs: Sequence[Config]) -> list[Encoded]:
    delta = new.finite(name, part).float() - old.finite(name, part).float()
    return encode_projection(part.name, delta, configs)


def _other(old: Checkpoint, new: Checkpoint, name: str, rows_dtypes: Sequence[str]) -> list[Encoded]:
    floating, shape = new.is_floating(name), new.shape(name)
    if not floating and torch.equal(old.tensor(name), new.tensor(name)):  # a table of positions, or the like
        return [Encoded(name, "zero", shape)] * len(rows_dtypes)
    if is_embedding(name):
        found = {
            dtype: encode_rows(name, old.table(name), new.table(name), dtype) for dtype in dict.fromkeys(rows_dtypes)
        }
        return [found[dtype] for dtype in rows_dtypes]
    return [encode_raw(name, old.finite(name), new.finite(name))] * len(rows_dtypes)


def in_order(tasks: Iterable[Task], workers: int) -> Iterator[list[Encoded]]:
    """Results in the order of the tasks, `workers` of them under way; a few more may wait, as small as they are by then, so that no
    worker waits for a slower one.
    """
    waiting: deque[Future[list[Encoded]]] = deque()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for task in tasks:
                if len(waiting) == _AHEAD * workers:
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
    return as_record(encoded, digests)


def tokenizer_info(
    old: Checkpoint, folder: Path, config: Mapping[str, Any], rows: int | None
) -> tuple[TokenizerInfo, Mapping[str, Array]]:
    """What the manifest says of the tokenizer in a fine-tune's `folder`, and its files as arrays by key.

    `config`: that of the fine-tune; `rows` of its token embedding. Raises CheckpointError.
    """
    text = chat_template(folder)
    own = own_tokenizer(old.folder, folder, rows, vocabulary_rows(old))
    told = TokenizerInfo(
        vocab_size=config.get("vocab_size"),
        eos_token_id=with_end_token(config.get("eos_token_id"), own.eos_token_id),
        chat_template_sha256=hashlib.sha256(text.encode()).hexdigest() if text is not None else None,
        chat_template=None if text == chat_template(old.folder) else text,
        files=dict(own.files),
    )
    return told, own.arrays


def vocabulary_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of the token embedding."""
    table = input_table(checkpoint.names)
    return None if table is None else checkpoint.shape(table)[0]
