"""What is wrong with input that was parsed: from the decoder's messages to pointers and stable codes.

The decoder stops at the first fault; people want all of them. So, only when it has failed, the value is taken apart field by field.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from mcp_control.kernel.errors import FieldError

MAX_ERRORS: Final = 50
# Members of answers that only the server writes; naming them in a request is a misunderstanding worth its own code.
READ_ONLY: Final = frozenset(
    {
        "agent_id", "attempt", "attempts", "created_at", "created_by", "epoch", "etag", "fence", "finished_at",
        "generation", "id", "lane",
        "lease", "lease_token", "log_lines", "origin", "progress", "reason", "result", "started_at", "state",
        "state_since", "tenant", "updated_at",
        "version",
    }
)  # fmt: skip
_AT: Final = re.compile(r"^(?P<text>.*?)(?: - at `(?:key in )?\$?(?P<path>[^`]*)`)?$", re.DOTALL)
_STEP: Final = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")


def field_errors(value: object, kind: object, error: Exception) -> list[FieldError]:
    """Return every fault of a parsed value against a shape, at most 50; `error` is what the decoder said of the first."""
    found = list(_faults(value, kind, "#"))[:MAX_ERRORS]
    return found or [_translate(str(error), "#")]


def _faults(value: object, kind: object, pointer: str) -> Iterator[FieldError]:
    struct = _struct_of(kind)
    if struct is None or not isinstance(value, dict):
        inner = _list_item(kind)
        if inner is not None and isinstance(value, list) and _struct_of(inner) is not None:
            for place, item in enumerate(value[:1000]):
                yield from _faults(item, inner, f"{pointer}/{place}")
            if not value:
                yield from _converted(value, kind, pointer)
            return
        inner = _member(kind)
        if inner is not None and isinstance(value, dict) and all(isinstance(key, str) for key in value):
            for key, item in list(value.items())[:1000]:
                yield from _faults(item, inner, f"{pointer}/{_escape(key)}")
            return
        yield from _converted(value, kind, pointer)
        return
    fields = {field.encode_name: field for field in msgspec.structs.fields(struct)}
    config = struct.__struct_config__
    tag = {config.tag_field} if config.tag_field else set()
    for key, item in value.items():
        if key in fields:
            yield from _faults(item, fields[key].type, f"{pointer}/{_escape(key)}")
        elif key not in tag and config.forbid_unknown_fields:
            yield _unknown(key, pointer)
    for name, field in fields.items():
        if field.required and name not in value:
            yield FieldError(pointer=f"{pointer}/{name}", code="missing-field", detail=f"{name} is required")


def _converted(value: object, kind: object, pointer: str) -> Iterator[FieldError]:
    if kind is msgspec.Raw or kind == msgspec.Raw | None:
        return
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        yield _translate(str(error), pointer)
    except (TypeError, OverflowError, ValueError):
        yield FieldError(pointer=pointer, code="out-of-range", detail="the value is out of range")


def _translate(message: str, pointer: str) -> FieldError:
    match = _AT.match(message)
    text, path = (match["text"], match["path"] or "") if match else (message, "")
    for name, place in _STEP.findall(path):
        pointer += "/" + (_escape(name) or place)
    if text.startswith("Object contains unknown field"):
        return _unknown(text.split("`")[1], pointer)
    if text.startswith("Object missing required field"):
        name = text.split("`")[1]
        return FieldError(pointer=f"{pointer}/{name}", code="missing-field", detail=f"{name} is required")
    if "datetime" in text or "RFC3339" in text:
        code = (
            "wrong-type"
            if text.startswith("Expected") and "got" in text and "tzinfo" not in text
            else "invalid-timestamp"
        )
        return FieldError(pointer=pointer, code=code, detail=text)
    if "out of range" in text or re.match(r"Expected `\w+`(?: of length)? ?[<>=]", text):
        return FieldError(pointer=pointer, code="out-of-range", detail=text)
    if "of length" in text or "matching regex" in text:
        return FieldError(
            pointer=pointer, code="out-of-range" if "of length" in text else "invalid-character", detail=text
        )
    if text.startswith(("Invalid enum value", "Invalid value")):
        # The decoder quotes what was sent; the answer does not.
        return FieldError(pointer=pointer, code="invalid-value", detail="not one of the allowed values")
    return FieldError(pointer=pointer, code="wrong-type", detail=text)


def _unknown(name: str, pointer: str) -> FieldError:
    place = f"{pointer}/{_escape(name)}"
    if name in READ_ONLY:
        return FieldError(pointer=place, code="read-only-field", detail=f"{name} is set by the server")
    return FieldError(pointer=place, code="unknown-field", detail="no such field")


def _escape(name: str) -> str:
    """Return a member name as a token of a JSON pointer (RFC 6901), cut where it is long."""
    return name.replace("~", "~0").replace("/", "~1")[:100]


def _struct_of(kind: object) -> Any:
    """Return the one Struct in a type, seen through `| None`; None where there is none or a choice."""
    info = msgspec.inspect.type_info(kind)
    members = info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
    structs = [member.cls for member in members if isinstance(member, msgspec.inspect.StructType)]
    return structs[0] if len(structs) == 1 else None


def _list_item(kind: object) -> object | None:
    arguments = getattr(kind, "__args__", ())
    return arguments[0] if getattr(kind, "__origin__", None) is list and arguments else None


def _member(kind: object) -> object | None:
    """Return the Struct that a dictionary's values are; None where they are something else."""
    arguments: tuple[object, ...] = getattr(kind, "__args__", ())
    found = arguments[1] if getattr(kind, "__origin__", None) is dict and len(arguments) == 2 else None
    return found if found is not None and _struct_of(found) is not None else None


def out_of_range(value: object, pointer: str = "#") -> Iterator[str]:
    """Return the places of integers beyond 64 bits in the typed parts of a decoded value."""
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            yield pointer
    elif isinstance(value, msgspec.Struct):
        for field in msgspec.structs.fields(value):
            yield from out_of_range(getattr(value, field.name), f"{pointer}/{field.encode_name}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from out_of_range(item, f"{pointer}/{_escape(str(key))}")
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from out_of_range(item, f"{pointer}/{place}")
