"""Which build of the gateway this is."""

import functools
import os
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Build:
    version: str
    git_sha: str


@functools.cache
def installed() -> Build:
    """ "unknown" stands for what cannot be told; images are built with DELTAWORKS_GIT_SHA set."""
    try:
        version = metadata.version("deltaworks")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return Build(version, os.environ.get("DELTAWORKS_GIT_SHA", "unknown"))
