"""Pages and cursors: keyset paging, so that a page costs the same wherever it lies."""

import base64
import binascii
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from mcp_control.kernel.changes import IndexValue
from mcp_control.kernel.errors import InvalidCursor

T = TypeVar("T")


class Page(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """Some items and the cursor of the next page; None when this was the last."""

    items: list[T]
    next_cursor: str | None = None


class _Cursor(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    scope: str
    position: list[IndexValue]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Cursor).decode


def encode_cursor(scope: str, position: Sequence[IndexValue]) -> str:
    """Return the opaque cursor for a position in the listing `scope`."""
    return base64.urlsafe_b64encode(_encode(_Cursor(scope, list(position)))).rstrip(b"=").decode()


def decode_cursor(scope: str, cursor: str, length: int) -> list[IndexValue]:
    """Return the position of a cursor.

    Raises:
        InvalidCursor: it is not a cursor of this listing with `length` values.
    """
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        found = _decode(raw)
    except (binascii.Error, ValueError, msgspec.MsgspecError) as error:
        raise InvalidCursor from error
    if found.scope != scope or len(found.position) != length:
        raise InvalidCursor
    return found.position
