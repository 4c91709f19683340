"""May these deltas be merged: one base, one vocabulary, one way to talk. Everything that is refused, is refused before work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from compressors.artifact import Array, Artifact, Manifest, TokenizerInfo
from compressors.errors import ArtifactError, BaseMismatchError, BudgetError, DeltaError
from compressors.fingerprint import fingerprint, stored_tensors
from compressors.tokenizer import array_key, digest
from compressors.verify import Report, verify


def checked(paths: Sequence[Path], base: Path, out: Path) -> list[Report]:
    """A report for every file. Raises BudgetError where `out` is one of them, and what `verify` raises, naming the file."""
    for path in paths:
        if out.exists() and path.exists() and out.samefile(path):
            raise BudgetError(f"-o {out} is one of the deltas to merge; name another file")
    base_fingerprint = fingerprint(base)
    shapes = {name: tensor.shape for name, tensor in stored_tensors(base).items()}
    reports = []
    for path in paths:
        try:
            reports.append(verify(path, base_fingerprint, shapes, base))
        except DeltaError as error:
            fix = (
                "; --base is the one base of all deltas that are merged" if isinstance(error, BaseMismatchError) else ""
            )
            raise type(error)(f"{path}: {error}{fix}") from error
    return reports


def shape_of(name: str, artifacts: Sequence[Artifact]) -> tuple[int, ...]:
    """The shape of a record, the same in all files that have it. Raises ArtifactError."""
    found = {artifact.records[name].shape: artifact for artifact in artifacts if name in artifact.records}
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise ArtifactError(
            f"{name} has shape {list(one)} in {first.path} and {list(other)} in {second.path}: deltas of vocabularies of "
            "different sizes cannot be merged; train both with the same added tokens, or none"
        )
    return next(iter(found))


def tied_table(name: str, artifacts: Sequence[Artifact]) -> str | None:
    """The table that a record repeats in all files that have it. Raises ArtifactError where one changes it by itself."""
    having = [artifact for artifact in artifacts if name in artifact.records]
    tied = [artifact for artifact in having if artifact.records[name].tied_to is not None]
    own = [a for a in having if a.records[name].tied_to is None and a.records[name].kind != "zero"]
    if tied and own:
        raise ArtifactError(
            f"{name} repeats the embedding in {tied[0].path} and has a change of its own in {own[0].path}"
        )
    return tied[0].records[name].tied_to if tied else None


def tokenizer(
    paths: Sequence[Path], manifests: Sequence[Manifest], base_ends: frozenset[int], chosen: Path | None
) -> TokenizerInfo:
    """What the merged delta says of its tokenizer: that of `chosen`, or what all files that change something agree on.

    `base_ends`: the base's end tokens. Raises BudgetError naming the files that disagree.
    """
    told = dict(zip(paths, (manifest.tokenizer for manifest in manifests), strict=True))
    _agree("vocabulary", {path: info.vocab_size for path, info in told.items() if info.vocab_size is not None}, "")
    if chosen is not None:
        found = [info for path, info in told.items() if path == chosen or path.resolve() == chosen.resolve()]
        if not found:
            raise BudgetError(f"--tokenizer-of {chosen} is none of the deltas to merge; name one of them")
        return found[0]
    fix = "; say whose to take with --tokenizer-of FILE"
    _agree("chat template", {path: info.chat_template for path, info in told.items() if info.chat_template}, fix)
    ends = {path: _ids(info.eos_token_id) for path, info in told.items()}
    carried = {path: ids for path, ids in ends.items() if ids and ids != base_ends}
    _agree("set of end tokens", carried, fix)
    _agree("tokenizer", {path: digest(info) for path, info in told.items()}, fix)
    infos = list(told.values())
    template = next((info for info in infos if info.chat_template), None)
    usual = template or next((info for info in infos if info.chat_template_sha256), infos[0])
    ending = next((told[path] for path in carried), None) or next(
        (info for info in infos if info.eos_token_id is not None), infos[0]
    )
    return TokenizerInfo(
        vocab_size=next((info.vocab_size for info in infos if info.vocab_size is not None), None),
        eos_token_id=ending.eos_token_id,
        chat_template_sha256=usual.chat_template_sha256,
        chat_template=usual.chat_template,
        files=infos[0].files,
    )


def tokenizer_arrays(told: TokenizerInfo, artifacts: Sequence[Artifact]) -> dict[str, Array]:
    """The files of the merged delta's tokenizer, from one of those that have it."""
    having = next((artifact for artifact in artifacts if artifact.manifest.tokenizer.files == told.files), None)
    return {array_key(name): having.array(array_key(name)) for name in told.files} if having is not None else {}


def end_tokens(base: Path) -> frozenset[int]:
    """The end tokens of a base's config.json."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return _ids(config.get("eos_token_id"))


def _agree(what: str, values: Mapping[Path, object], fix: str) -> None:
    paths = list(values)
    for path in paths[1:]:
        if values[path] != values[paths[0]]:
            raise BudgetError(f"{paths[0]} and {path} have a different {what}{fix}")


def _ids(eos_token_id: int | list[int] | None) -> frozenset[int]:
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
