"""Which text may stand in names, labels and messages: nothing that hides, breaks lines or steers a terminal."""

import re
from collections.abc import Mapping
from typing import Final

from mcp_control.kernel.errors import FieldError

# Control characters, line and paragraph separators, bidirectional controls, zero-width characters, byte-order mark, lone surrogates.
_HIDDEN: Final = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+ -]*")
LABELS_MAX: Final = 64


def name_errors(pointer: str, value: str, longest: int = 128) -> list[FieldError]:
    """Return what is wrong with a name: 1 to `longest` letters, digits, blanks and `. _ : / @ + -`, the first a letter or digit."""
    if not value:
        return [FieldError(pointer=pointer, code="out-of-range", detail="must not be empty")]
    if len(value) > longest:
        return [FieldError(pointer=pointer, code="limit-exceeded", detail=f"at most {longest} characters")]
    if not _NAME.fullmatch(value) or value[-1] == " ":
        return [
            FieldError(
                pointer=pointer, code="invalid-character", detail="letters, digits, blanks and . _ : / @ + - only"
            )
        ]
    return []


def text_errors(pointer: str, value: str, longest: int) -> list[FieldError]:
    """Return what is wrong with a text for people: at most `longest` characters, none of them hidden or controlling."""
    if len(value) > longest:
        return [FieldError(pointer=pointer, code="limit-exceeded", detail=f"at most {longest} characters")]
    if _HIDDEN.search(value):
        return [FieldError(pointer=pointer, code="invalid-character", detail="control or hidden characters")]
    return []


def label_errors(pointer: str, labels: Mapping[str, str]) -> list[FieldError]:
    """Return what is wrong with labels: at most 64, names of up to 63 characters, values of up to 255."""
    if len(labels) > LABELS_MAX:
        return [FieldError(pointer=pointer, code="limit-exceeded", detail=f"at most {LABELS_MAX} labels")]
    found: list[FieldError] = []
    for name, value in labels.items():
        found += name_errors(f"{pointer}/{_token(name)}", name, 63)
        found += text_errors(f"{pointer}/{_token(name)}", value, 255)
    return found


def range_errors(pointer: str, value: float, low: float, high: float) -> list[FieldError]:
    """Return what is wrong with a number that must lie in [low, high]."""
    if low <= value <= high:
        return []
    return [FieldError(pointer=pointer, code="out-of-range", detail=f"must be from {low:g} to {high:g}")]


def visible(text: str) -> str:
    """Return the text with hidden and controlling characters made visible, for messages that quote input."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _token(name: str) -> str:
    return visible(name[:63]).replace("~", "~0").replace("/", "~1")
