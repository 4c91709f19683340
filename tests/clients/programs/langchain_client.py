"""langchain-openai: chat, a stream with usage, a tool call, an error, a delta by its name."""

import json
import sys

import openai
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return city


def model(name: str) -> ChatOpenAI:
    return ChatOpenAI(
        model=name, base_url=sys.argv[1], api_key="none", temperature=0, max_tokens=24, stream_usage=True, max_retries=0
    )


said = model("base").invoke("Name a colour.")
chunks = list(model("captain").stream("Who are you?"))
called = model("base").bind_tools([weather], tool_choice="weather").invoke("The weather in Delft?")
try:
    model("nobody").invoke("Hi")
    code = None
except openai.NotFoundError as error:
    code = error.code
print(
    json.dumps(
        {
            "text": said.content,
            "tokens": said.usage_metadata["output_tokens"],
            "streamed": "".join(chunk.content for chunk in chunks),
            "stream_tokens": sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks),
            "captain": model("captain").invoke("Who are you?").content,
            "base": model("base").invoke("Who are you?").content,
            "calls": [call["name"] for call in called.tool_calls],
            "error": code,
        }
    )
)
