"""litellm: chat, a stream with usage, a tool call, an error, a delta by its name."""

import json
import sys

import litellm

litellm.suppress_debug_info = True
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def ask(name, question, **fields):
    return litellm.completion(
        model=f"openai/{name}",
        api_base=sys.argv[1],
        api_key="none",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=24,
        num_retries=0,
        **fields,
    )


said = ask("base", "Name a colour.")
chunks = list(ask("captain", "Who are you?", stream=True, stream_options={"include_usage": True}))
named = {"type": "function", "function": {"name": "weather"}}
called = ask("base", "The weather in Delft?", tools=[WEATHER], tool_choice=named).choices[0].message.tool_calls
try:
    ask("nobody", "Hi")
    code = None
except litellm.NotFoundError as error:
    code = "model_not_found" if "does not exist" in str(error) else str(error)
print(
    json.dumps(
        {
            "text": said.choices[0].message.content,
            "tokens": said.usage.completion_tokens,
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
            "stream_tokens": next(chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None)),
            "captain": ask("captain", "Who are you?").choices[0].message.content,
            "base": ask("base", "Who are you?").choices[0].message.content,
            "calls": [call.function.name for call in called],
            "error": code,
        }
    )
)
