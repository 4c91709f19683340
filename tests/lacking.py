"""What the tests need and make fetches: here it may be lacking, in CI it may not."""

import os
from typing import NoReturn

import pytest


def lacking(what: str) -> NoReturn:
    """Skips, but in CI, which fetches it."""
    if os.environ.get("CI"):
        pytest.fail(f"CI has no {what}")
    pytest.skip(f"no {what}")
