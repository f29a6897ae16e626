"""Logs: one event per line, as JSON or for a console, with the request they belong to and without secrets.

Everything goes through one pipeline, the standard library's loggers included, so no library can write past the redaction.
"""

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from typing import Any, Final, Literal, TextIO

import structlog

REDACTED: Final = "[redacted]"
request_id: Final[ContextVar[str]] = ContextVar("request_id", default="")

_SECRET_KEYS: Final = re.compile(
    r"pass(word|wd|phrase)?$|password|secret|authorization|cookie|credential$|api[_-]?key|private[_-]?key"
    r"|(^|[_-])(access|refresh|lease|id|bearer|enrolment|enrollment|session|api)?[_-]?token$|(^|[_-])jwt$|^headers?$",
    re.IGNORECASE,
)
_SECRET_TEXT: Final = (
    re.compile(r"eyJ[A-Za-z0-9_-]{5,}(\.[A-Za-z0-9_-]*){0,4}"),
    re.compile(r"\bmcp[tae]_[0-9A-Za-z_]{8,}"),
    re.compile(r"\b(?:Bearer|Basic)\s+[^\s\"',;]+", re.IGNORECASE),
    re.compile(
        r"((?:password|passwd|secret|access_token|api_key|token)[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s&,;}\"']+)",
        re.IGNORECASE,
    ),
    re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/:@]*:)[^\s/@]+(?=@)", re.IGNORECASE),
)
# C0, DEL, C1, line and paragraph separators, and the marks that turn the direction of text.
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_CHATTY: Final = ("uvicorn", "uvicorn.error", "websockets", "httpx2", "httpcore2")
_MAX_TEXT: Final = 8192
_MAX_DEPTH: Final = 6
_MAX_ITEMS: Final = 100
# Written by ourselves and structured; escaping their line ends is left to the renderer.
_TRACE: Final = frozenset({"exception", "stack"})


def redact(text: str) -> str:
    """Return the text without what looks like a credential. Pure."""
    for pattern in _SECRET_TEXT:
        text = pattern.sub(lambda found: (found[1] if found.re.groups and _keeps(found.re) else "") + REDACTED, text)
    return text


def _keeps(pattern: re.Pattern[str]) -> bool:
    """Say whether the pattern's first group is what stands before the secret."""
    return pattern.pattern.startswith("(")


def encode_controls(text: str) -> str:
    """Return the text with control characters written out, so that input cannot forge lines or steer a terminal. Pure."""
    return _CONTROL.sub(
        lambda found: f"\\x{ord(found[0]):02x}" if ord(found[0]) < 256 else f"\\u{ord(found[0]):04x}", text
    )


def clean(value: object, depth: int = 0) -> object:
    """Return a value as it may be logged: cut to size, without secrets and control characters. Pure."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    if isinstance(value, Mapping):
        if depth >= _MAX_DEPTH:
            return "{…}"
        items = list(value.items())[:_MAX_ITEMS]
        return {encode_controls(redact(str(key)[:256])): _of_key(str(key), item, depth + 1) for key, item in items}
    if isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, str):
        return "[…]" if depth >= _MAX_DEPTH else [clean(item, depth + 1) for item in list(value)[:_MAX_ITEMS]]
    text = str(value)
    if len(text) > _MAX_TEXT:
        text = f"{text[:_MAX_TEXT]}… ({len(text)} characters)"
    return encode_controls(redact(text))


def _of_key(key: str, value: object, depth: int) -> object:
    return REDACTED if _SECRET_KEYS.search(key) and value not in (None, "", True, False) else clean(value, depth)


def clean_event(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The processor that cleans every event before it is written."""
    for key, value in list(event.items()):
        if key in _TRACE and isinstance(value, str):
            event[key] = "\n".join(encode_controls(line) for line in redact(value).split("\n"))
        elif not key.startswith("_"):
            event[key] = _of_key(key, value, 0)
    return event


def add_request(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The processor that says to which request an event belongs."""
    current = request_id.get()
    if current:
        event.setdefault("request_id", current)
    return event


def configure(
    level: str = "info",
    format: Literal["auto", "json", "console"] = "auto",
    stream: TextIO | None = None,
) -> None:
    """Set up logging for the process; called once, by the command that starts it. Calling it again replaces the set-up.

    Args:
        level: least severe level written.
        format: `json` for one object per line, `console` for people, `auto` by whether the stream is a terminal.
        stream: where to; standard error by default.
    """
    target = stream or sys.stderr
    as_json = format == "json" or (format == "auto" and not target.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        add_request,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        structlog.processors.UnicodeDecoder(),
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer(sort_keys=False, ensure_ascii=False)
        if as_json
        else structlog.dev.ConsoleRenderer(colors=target.isatty(), exception_formatter=structlog.dev.plain_traceback)
    )
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, clean_event, renderer],
        )
    )
    root = logging.getLogger()
    for old in list(root.handlers):
        if getattr(old, "_mcp_control", False):
            root.removeHandler(old)
    handler._mcp_control = True  # type: ignore[attr-defined] # marks it as ours, to be replaced by the next call
    root.addHandler(handler)
    root.setLevel(level.upper())
    # What servers and clients tell of every connection is for those who look for a fault in it.
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.DEBUG if level == "debug" else logging.WARNING)
