"""What the servers of a cluster keep about themselves in the store."""

from typing import Final

import msgspec

from mcp_control.kernel.breaker_rules import BreakerStatus
from mcp_control.kernel.changes import Field, Index, Kind


class Leader(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who does what only one server should do.

    Attributes:
        holder: id of the server; empty when the last one gave it up.
        term: grows by one with every change of holder.
        until: wall milliseconds on the store's clock after which another server may take over.
    """

    version: int = 0
    holder: str = ""
    term: int = 0
    until: int = 0


class Node(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A server of the cluster.

    Attributes:
        id: made anew with every start.
        name: as people call it.
        url: where it answers; empty when it does not say.
        port: where it listens, on a machine or in a container of this name. Of two servers with the same name and port the earlier one is
            gone. 0 where the system chose one.
        software: version of the server.
        until: wall milliseconds on the store's clock; a server that has not been heard of by then is gone.
        sessions: ids of its sessions with the database, to be ended when it is gone.
        breakers: those around what it calls.
    """

    id: str
    version: int = 0
    name: str
    url: str = ""
    port: int = 0
    software: str = ""
    started_at: int
    until: int
    sessions: list[bytes] = []
    breakers: list[BreakerStatus] = []


IDENTITY_KIND: Final = Kind(name="identity")
LEADER_KIND: Final = Kind(name="leader")
NODE_KIND: Final = Kind(name="node", fields=(Field("until", "int"),), indexes=(Index("node_until", ("until", "id")),))
KINDS: Final = (IDENTITY_KIND, LEADER_KIND, NODE_KIND)
