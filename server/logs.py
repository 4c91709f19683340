"""Log lines: a JSON object or a line of text per record. What could end a line or command a terminal is escaped in both."""

import json
import logging
import sys
import time
from typing import Literal

LogFormat = Literal["json", "text"]


class JsonFormatter(logging.Formatter):
    """One JSON object a line. Fields arrive as the record's `fields`; prompts and keys never do."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """The same for a person: time, level, logger, message, then key=value; what is unknown is left out."""

    def format(self, record: logging.LogRecord) -> str:
        parts = [_timestamp(record), record.levelname, record.name, _printable(record.getMessage())]
        fields = getattr(record, "fields", {})
        parts += [f"{key}={_text(value)}" for key, value in fields.items() if value is not None]
        if record.exc_info:
            parts.append(f"exception={json.dumps(self.formatException(record.exc_info))}")
        return " ".join(parts)


def log_to_stderr(log_format: LogFormat, level: int = logging.INFO) -> None:
    """Send the log lines of the gateway and of what it serves with to standard error; called once, by the CLI."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    for name in ("deltaworks", "uvicorn", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def _timestamp(record: logging.LogRecord) -> str:
    """RFC 3339, UTC."""
    created = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{created}.{int(record.msecs):03d}Z"


def _text(value: object) -> str:
    """Words as they are, everything else as JSON."""
    if isinstance(value, str) and value.isascii() and value.isprintable() and value and not set(value) & set(' "='):
        return value
    return json.dumps(value, default=str)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
