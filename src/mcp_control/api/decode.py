"""Request bodies: from bytes to Structs by compiled decoders, strictly, with every refusal under its stable code.

What RFC 8259 leaves open is closed here for all bodies, opaque payloads included: no NaN, no lone surrogate, no NUL, at most 32
levels. Duplicate keys: the last one wins, but for decoders that say `unique_keys` (routes that grant access).
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Generic, TypeVar

import msgspec
import orjson

from mcp_control.kernel.errors import DuplicateKey, FieldError, Invalid, MalformedJson, TooDeep
from mcp_control.kernel.shapes import field_errors, out_of_range

T = TypeVar("T")
MAX_DEPTH: Final = 32
_TO_SQUARE: Final = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS: Final = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STRING: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NUL: Final = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
# What may stand before a number, and digits, as one byte each; the search for a text takes a tenth of that for a pattern.
_TO_NUMBERS: Final = bytes.maketrans(b"[, \t\r\n-123456789", b":::::::000000000")
# Only where a number may begin: digests and keys inside strings hold long runs of digits too.
_LONG_INT: Final = b":" + b"0" * 19


def _brackets(raw: bytes) -> bytes:
    """Return what nests: every bracket outside strings, as square ones."""
    return _STRING.sub(b"", raw).translate(_TO_SQUARE, _NOT_BRACKETS)


def check_json(raw: bytes, depth: int | None = MAX_DEPTH) -> None:
    """Refuse bytes that are not JSON as this product allows it.

    Args:
        depth: levels allowed; None where the caller looks at the parts that may nest.

    Raises:
        MalformedJson: truncated, trailing bytes, NaN, BOM, invalid UTF-8, a lone surrogate, a number no double holds.
        TooDeep: more than `depth` levels.
        Invalid: `invalid-character` for a NUL in a string or key.
    """
    try:
        orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if b"[" * (MAX_DEPTH + 1) in _brackets(raw):
            raise TooDeep(f"at most {MAX_DEPTH} levels are allowed") from error
        raise MalformedJson(error.msg, offset=error.pos) from error
    if depth is not None:
        check_depth(raw, depth)
    if b"\\u0000" in raw and _NUL.search(raw):
        raise Invalid(
            "NUL characters are not allowed",
            errors=[
                FieldError(pointer=pointer, code="invalid-character", detail="NUL character")
                for pointer in _nuls(orjson.loads(raw))
            ],
        )


def check_depth(raw: bytes, depth: int = MAX_DEPTH) -> None:
    """Raise TooDeep when JSON nests more than `depth` levels."""
    if raw.count(b"[") + raw.count(b"{") <= depth:
        return
    left = _brackets(raw)
    for _ in range(depth):  # each pass takes the innermost level away, at the speed of memory
        left = left.replace(b"[]", b"")
        if not left:
            return
    raise TooDeep(f"at most {depth} levels are allowed")


def _nuls(value: object, pointer: str = "#") -> Iterator[str]:
    if isinstance(value, str):
        if "\0" in value:
            yield pointer
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _nuls(item, f"{pointer}/{place}")
    elif isinstance(value, dict):
        for key, item in value.items():
            if "\0" in key:
                yield pointer
            yield from _nuls(item, f"{pointer}/{key}")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise DuplicateKey("every key may appear once")
    return found


class Body(Generic[T]):
    """A compiled decoder for the bodies of one shape.

    Args:
        type: the Struct.
        envelope: levels of the shape around its opaque parts; payloads may nest 32 levels whatever carries them.
        unique_keys: refuse duplicate keys.
        optional: an empty body stands for a Struct of defaults.
        media_types: what the route reads.
        opaque: returns the only parts that may nest, where looking at the whole body for its depth would cost too much.
    """

    __slots__ = ("_decode", "_depth", "_keys", "_opaque", "media_types", "optional", "type", "unique_keys")

    def __init__(
        self,
        type: type[T],
        *,
        envelope: int = 0,
        unique_keys: bool = False,
        optional: bool = False,
        media_types: tuple[str, ...] = ("application/json",),
        opaque: Callable[[T], Iterable[bytes]] | None = None,
    ) -> None:
        self.type = type
        self._opaque = opaque
        self.unique_keys = unique_keys
        self.optional = optional
        self.media_types = media_types
        self._depth = MAX_DEPTH + envelope
        self._decode: Callable[[bytes], T] = msgspec.json.Decoder(type).decode
        self._keys = _key_checker(type)

    def decode(self, raw: bytes) -> T:
        """Return the Struct.

        Raises:
            MalformedJson, TooDeep, DuplicateKey: 400.
            Invalid: 422 with all errors found, at most 50.
        """
        if not raw:
            if self.optional:
                return self.type()
            raise Invalid(
                "the body is empty",
                errors=(FieldError(pointer="#", code="wrong-type", detail="expected an object, got nothing"),),
            )
        check_json(raw, self._depth if self._opaque is None else None)
        if self.unique_keys:
            json.loads(raw, object_pairs_hook=_no_duplicates)
        try:
            value = self._decode(raw)
        except msgspec.MsgspecError as error:
            errors = field_errors(orjson.loads(raw), self.type, error)
            raise Invalid(errors[0].detail, errors=errors) from error
        if self._opaque is not None:
            for part in self._opaque(value):
                check_depth(part)
        if _LONG_INT in raw.translate(_TO_NUMBERS) and (pointers := list(out_of_range(value))):
            raise Invalid(
                "integers must fit 64 bits",
                errors=[
                    FieldError(pointer=pointer, code="out-of-range", detail="beyond 64 bits") for pointer in pointers
                ],
            )
        if self._keys is not None and (paths := self._keys(value)):
            raise Invalid(
                "keys may not start with $ or hold a dot",
                errors=[
                    FieldError(
                        pointer=f"#/{path}", code="invalid-character", detail="a key may not start with $ or hold a dot"
                    )
                    for path in paths
                ],
            )
        return value


_Checker = Callable[[Any], Sequence[str]]
"""Returns the paths inside a value that lead to bad keys. Nearly always there are none, and nothing is made then."""
# Capability names hold dots by nature, and what is opaque is nobody's business.
_FREE_KEYS: Final = frozenset({"capabilities", "with_", "input_schema", "output_schema", "data", "fields"})


def _key_checker(kind: object) -> _Checker | None:
    """Compile the check of dictionary keys in typed places of a shape; None where it has none."""
    return _checker(msgspec.inspect.type_info(kind))


def _checker(info: msgspec.inspect.Type) -> _Checker | None:
    match info:
        case msgspec.inspect.DictType():
            return _bad_keys
        case msgspec.inspect.ListType(item_type=item):
            return _each(inner) if (inner := _checker(item)) else None
        case msgspec.inspect.UnionType(types=types):
            found = [inner for member in types if (inner := _checker(member))]
            return found[0] if found else None
        case msgspec.inspect.StructType(fields=fields):
            inside = [
                (field.name, field.encode_name, inner)
                for field in fields
                if field.name not in _FREE_KEYS and (inner := _checker(field.type))
            ]
            return _members(inside) if inside else None
    return None


def _bad_keys(value: dict[str, object]) -> Sequence[str]:
    return [key for key in value if key.startswith("$") or "." in key]


def _each(inner: _Checker) -> _Checker:
    def check(value: list[object]) -> Sequence[str]:
        found: list[str] = []
        for place, item in enumerate(value):
            if item and (bad := inner(item)):
                found += [f"{place}/{path}" for path in bad]
        return found

    return check


def _members(inside: list[tuple[str, str, _Checker]]) -> _Checker:
    def check(value: object) -> Sequence[str]:
        found: Sequence[str] = ()
        for name, shown, inner in inside:
            if (member := getattr(value, name)) and (bad := inner(member)):
                found = [*found, *(f"{shown}/{path}" for path in bad)]
        return found

    return check
