"""Errors of this house. Transport-free: the CLI prints them, the gateway maps them to a status.

DeltaError
├── ArtifactError          a delta file is damaged, incomplete or not a delta file
│   └── FormatVersionError it was written by a newer version of the format
├── UnknownMethodError     it names a compression method that this version does not know
├── BaseMismatchError      it belongs to another base model
├── CheckpointError        a base or fine-tune folder cannot be used
├── BudgetError            the asked ratio or setting cannot be met
└── SlotError              the GPU kernels' buffers, sized at start, have no room for it
"""


class DeltaError(Exception):
    """Root of what can be wrong with a delta, its base or its settings; the message names the tensor or field.

    `fault`: what the file fails on, in a word for the metrics, where that is told.
    """

    def __init__(self, message: str, *, fault: str | None = None) -> None:
        super().__init__(message)
        self.fault = fault


class ArtifactError(DeltaError):
    """A delta file that cannot be trusted: truncated, damaged, inconsistent, or another kind of file."""


class FormatVersionError(ArtifactError):
    """A delta file of a newer format than this version reads."""


class UnknownMethodError(DeltaError):
    """A compression method that this version does not know."""


class BaseMismatchError(DeltaError):
    """A delta of another base model."""


class CheckpointError(DeltaError):
    """A model folder that cannot be read, lacks tensors, or holds values that are no numbers."""


class BudgetError(DeltaError):
    """Compression settings that cannot be met."""


class SlotError(DeltaError):
    """A delta does not fit the buffers that were set up at start; the message says which limit."""
