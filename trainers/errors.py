"""Errors of this house; the CLI prints them.

TrainerError
├── RecipeError   a recipe file, or what it asks for, cannot be used
├── DataError     training data cannot be read
└── RunError      the output folder holds another run
"""


class TrainerError(Exception):
    """Root of what can go wrong in training and checking; the message says what to change."""


class RecipeError(TrainerError):
    """A recipe that cannot be read, or has an unknown or impossible field."""


class DataError(TrainerError):
    """A data file that is missing, or a row without a needed field."""


class RunError(TrainerError):
    """An output folder that holds another run, or an unfinished one."""
