"""vLLM's own parsers on the texts of tool_texts.py. Run as a module, it records what they say:

python -m tests.server.vllm_parsers
"""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "data" / "vllm_tool_calls.json"
NAMES = ("hermes", "llama3_json", "pythonic")

Answer = dict[str, Any]


def record() -> list[Answer]:
    """The recorded answers: [{"text", "hermes": {"content", "calls": [[name, arguments]]}, ...}]; null is "all content"."""
    found: list[Answer] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def read_all(texts: list[str]) -> list[Answer]:
    from transformers import AutoTokenizer
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    from compressors.base import default_base

    logging.getLogger("vllm").setLevel(logging.CRITICAL)
    tokenizer = AutoTokenizer.from_pretrained(default_base(progress=False))
    tokenizer.add_tokens(["<|python_tag|>"], special_tokens=True)  # llama3_json looks it up
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "hi"}], model="any")
    parsers = {name: ToolParserManager.get_tool_parser(name) for name in NAMES}
    answers = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's, about escapes in what it is given to parse
        for text in texts:
            answer: Answer = {"text": text}
            for name, parser in parsers.items():
                found = parser(tokenizer).extract_tool_calls(text, request)
                calls = [[call.function.name, call.function.arguments] for call in found.tool_calls]
                plain = found.content == text and not calls
                answer[name] = None if plain else {"content": found.content, "calls": calls}
            answers.append(answer)
    return answers


if __name__ == "__main__":
    from tests.server.tool_texts import texts

    RECORD.write_text(json.dumps(read_all(texts()), indent=0) + "\n", encoding="utf-8")
    print(f"{len(record())} texts", file=sys.stderr)
