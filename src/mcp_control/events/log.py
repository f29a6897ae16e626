"""Making facts."""

from typing import Final

import msgspec

from mcp_control.kernel.changes import Fact
from mcp_control.security.model import DEFAULT_TENANT

_encode: Final = msgspec.json.Encoder().encode


def fact(
    kind: str, subject: str, actor: str, now: int, data: object = None, *, tenant: str = DEFAULT_TENANT, run: str = ""
) -> Fact:
    """Return the fact that `kind` (`noun.verb`, past tense) happened to `subject` at `now`, caused by `actor`.

    Args:
        data: a small JSON-able object; None is `{}`.
        run: id of the run it belongs to.
    """
    return Fact(kind, subject, tenant, now, actor, b"{}" if data is None else _encode(data), run)
