"""Shares of the slots as they are stored, and as operators see and weight them."""

from datetime import datetime
from typing import Final

import msgspec

from mcp_control.kernel.changes import Field, Index, Kind
from mcp_control.security.model import DEFAULT_TENANT


class ShareRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is kept of a share.

    Attributes:
        key: as in `Fairness.key`; empty is the tenant's own.
        weight: the one an operator gave it; None where that of its tasks counts.
        served: tasks of it that were given to agents, ever. Counted in memory and written now and then: some may be missing after a crash.
        updated_at: wall milliseconds; when it was last served or weighted.
    """

    id: str
    version: int
    tenant: str = DEFAULT_TENANT
    key: str = ""
    weight: float | None = None
    served: int = 0
    updated_at: int = 0


class ShareOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The weight an operator gives a share, 0.1 to 100; null leaves it to its tasks again. An empty key is the tenant's own share."""

    key: str = ""
    weight: float | None = None


class ShareView(msgspec.Struct, frozen=True, kw_only=True):
    """A share as callers see it.

    Attributes:
        key: as tasks name it; empty for all tasks without one.
        weight: the one that counts: an operator's, else that of its newest task.
        ordered: whether an operator gave it.
        waiting: tasks of it that wait for an agent.
        served: tasks of it that were given to agents; of tasks without a key only since there are others.
        updated_at: when it was last served or weighted.
    """

    key: str
    weight: float
    ordered: bool
    waiting: int
    served: int
    updated_at: datetime


SHARE_KIND: Final = Kind(
    name="share",
    fields=(Field("name"), Field("ordered", "int"), Field("unused", "int")),
    indexes=(
        Index("share_name", ("name",), unique=True),
        Index("share_ordered", ("ordered", "id")),
        Index("share_unused", ("unused", "id")),
    ),
)
