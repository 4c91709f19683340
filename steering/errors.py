"""Errors of this house; the CLI prints them, the gateway maps them.

SteeringError
├── SAEFormatError    an SAE file or folder cannot be read
├── SAEMismatchError  an SAE does not fit the model, the layer or the data
├── ProfileError      a profile file cannot be read, or does not fit the model
├── EditError         an edit asks for something impossible; `param` is the dotted field
├── FitError          labelled activations or questions from which nothing can be fitted
├── PolicyError       a tool-gate policy cannot be read
├── LabelError        a row of tasks or labels cannot be read
└── EndpointError     a model or tool server does not answer as it should
"""

from __future__ import annotations


class SteeringError(Exception):
    """Root of what can go wrong with SAEs, profiles, edits and tool gates; the message says what to change."""


class SAEFormatError(SteeringError):
    """An SAE that cannot be read: unknown format, missing or damaged tensors, a pickle."""


class SAEMismatchError(SteeringError):
    """An SAE of another width, layer or model, or one that does not reconstruct what it is given."""


class ProfileError(SteeringError):
    """A profile that cannot be read, or was fitted for another model."""


class EditError(SteeringError):
    """An impossible edit. `param` names the field of the request, dotted."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class FitError(SteeringError):
    """Activations, labels or losses from which nothing can be fitted."""


class PolicyError(SteeringError):
    """A tool-gate policy that cannot be read; the message names the field."""


class LabelError(SteeringError):
    """A file of tasks or labels that cannot be read; the message names the line."""


class EndpointError(SteeringError):
    """A model server or a tool server that cannot be reached, refuses a request, or answers in another shape."""
