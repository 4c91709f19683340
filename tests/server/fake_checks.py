"""Checks of uploads that look at the bytes of tests: what starts with "broken" is damaged, with "foreign" of another base."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from compressors.artifact import TokenizerInfo
from compressors.errors import ArtifactError, BaseMismatchError
from compressors.verify import Report
from server.artifacts.checks import Checks, delta_check, policy_check
from server.artifacts.store import Incoming
from server.artifacts.versions import ProfileVersion, SAEVersion
from steering.errors import ProfileError, SAEMismatchError


def fake_verify(path: Path) -> Report:
    content = path.read_bytes()
    if content.startswith(b"broken"):
        raise ArtifactError("the header is cut off; upload the file again")
    if content.startswith(b"foreign"):
        raise BaseMismatchError("made for another base")
    manifest = SimpleNamespace(
        method="impart", base_fingerprint="sha256:ba5e", ratio=32.0, bytes_ratio=None, tokenizer=TokenizerInfo()
    )
    return Report(hashlib.sha256(content).hexdigest(), len(content), manifest, ("structure",))


def fake_check(error: type[Exception], facts: dict[str, Any], version: Any) -> Callable[[Incoming], Any]:
    """A check of files that hold JSON: what they say replaces `facts`."""

    def check(incoming: Incoming) -> Any:
        content = incoming.path.read_bytes()
        if content.startswith(b"broken"):
            raise error("the header is cut off; upload the file again")
        said = {"digest": incoming.digest, "nbytes": incoming.nbytes, "created": 1, **facts, **json.loads(content)}
        return version.model_validate_json(json.dumps(said))

    return check


PROFILE = {
    "base_fingerprint": "sha256:ba5e",
    "model_name": "tiny",
    "template_sha256": hashlib.sha256(b"{{ messages }}").hexdigest(),
    "directions": {
        "use_context": {"layers": [12, 13], "strength": 2.0},
        "use_parameter": {"layers": [13, 14], "strength": 1.5},
    },
    "latents": {"12": 10, "13": 20, "14": 30},
    "probe": {"layer": 11, "threshold": 0.6, "auroc": 0.9},
}
SAE = {
    "base_fingerprint": "sha256:ba5e",
    "model_name": "tiny",
    "architecture": "topk",
    "layer": 13,
    "d_in": 8,
    "d_sae": 64,
}
CHECKS = Checks(
    delta_check(fake_verify),
    fake_check(ProfileError, PROFILE, ProfileVersion),
    fake_check(SAEMismatchError, SAE, SAEVersion),
    policy_check("sha256:ba5e"),
)
