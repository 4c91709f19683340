"""Requests that get far: what schemathesis makes up well-formed seldom fits a base, a context or a file.

Of well-formed requests those to a model that is there ask it something short, and uploads say the digest of their file.
"""

import hashlib
from typing import Any

import schemathesis

MODELS = ("tiny-base", "red", "blue")  # as in schemathesis.toml
PROMPTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "max_tokens": 4},
    "/v1/completions": {"prompt": ["a", "bc"], "logprobs": 2, "echo": True, "max_tokens": 4},
}
# Fields that do not depend on the prompt, the base or each other.
FREE = (
    *("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("stop", "ignore_eos", "cache_salt", "request_id", "stream", "parallel_tool_calls"),
)


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    body = case.body  # changed in place: a new one would be judged again, as the schema has it
    if not case.meta.generation.mode.is_positive or not isinstance(body, dict):
        return case
    if case.path in PROMPTS and body.get("model") in MODELS:
        for field in body.keys() - {*FREE, "model"}:
            del body[field]
        body |= {"stream": True, **body, **PROMPTS[case.path]}
    if case.path == "/v1/admin/deltas":
        file = body["file"]
        content = getattr(file, "data", file)
        if isinstance(content, bytes):
            body["sha256"] = hashlib.sha256(content).hexdigest()
            case.query.clear()
            for field in ("base_fingerprint", "expected_generation"):
                body.pop(field, None)
    return case
