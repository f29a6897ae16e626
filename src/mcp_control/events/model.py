"""The shape of an event as people and programs see it (CloudEvents 1.0 attribute names)."""

from datetime import datetime
from typing import Final

import msgspec

from mcp_control.kernel.changes import StoredFact
from mcp_control.kernel.clock import to_datetime
from mcp_control.kernel.errors import InvalidCursor

SPEC_VERSION: Final = "1.0"
_PREFIX: Final = "evt_"


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """A fact on the wire. `id` is also the cursor: resume after it and nothing is missed.

    Attributes:
        id: `evt_` and the number of the fact; grows by one from event to event.
        type: `noun.verb`, past tense.
        source: the component that owns the noun, e.g. `/tasks`.
        subject: the id of the thing.
        data: JSON object; its members depend on the type.
        run: id of the run it belongs to, if any.
    """

    id: str
    type: str
    source: str
    subject: str
    time: datetime
    tenant: str
    actor: str
    data: msgspec.Raw
    run: str | None = None
    specversion: str = SPEC_VERSION


def event_id(seq: int) -> str:
    """Return the id of the fact number `seq`."""
    return f"{_PREFIX}{seq}"


def event_seq(identifier: str) -> int:
    """Return the number in an event id. Raises InvalidCursor where the text is not one."""
    digits = identifier.removeprefix(_PREFIX)
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 18):
        raise InvalidCursor
    return int(digits)


def to_event(stored: StoredFact) -> Event:
    """Return a stored fact in its wire shape."""
    fact = stored.fact
    return Event(
        id=event_id(stored.seq),
        type=fact.type,
        source="/" + fact.type.partition(".")[0] + "s",
        subject=fact.subject,
        time=to_datetime(fact.at),
        tenant=fact.tenant,
        actor=fact.actor,
        data=msgspec.Raw(fact.data),
        run=fact.run or None,
    )
