"""Which template renders chats with tools: the model's own, one of ours, or a file of the operator."""

import re
from pathlib import Path

from server.toolcalls import PARSERS

_FOLDER = Path(__file__).parent / "templates"


class ToolTemplateError(Exception):
    """The setting tools.template cannot be used; ends the start of the server."""


def choose(setting: str, parser: str, own: str) -> str:
    """The template's text for the setting `tools.template`; `own` is the model's, "" where it has none.

    Raises ToolTemplateError.
    """
    if setting == "auto":
        return own if mentions_tools(own) else shipped(parser)
    if setting == "own":
        if not mentions_tools(own):
            raise ToolTemplateError(
                'tools.template is "own", but the chat template of the model does not mention tools'
            )
        return own
    if setting in PARSERS:
        return shipped(setting)
    try:
        return Path(setting).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(("auto", "own", *PARSERS))
        raise ToolTemplateError(f"tools.template {setting!r} is none of {known}, and no file: {error}") from error


def mentions_tools(template: str) -> bool:
    return re.search(r"\btools\b", template) is not None


def shipped(parser: str) -> str:
    """Ours for models that speak ChatML: it asks for calls in the format that the parser reads."""
    return (_FOLDER / f"tools_{parser}.jinja").read_text(encoding="utf-8")
