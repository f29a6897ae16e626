"""The identity of a store: what tells the Redis keys and messages of one cluster from those of another."""

from typing import Final

from mcp_control.coordination.model import IDENTITY_KIND
from mcp_control.kernel.changes import Change, Entity
from mcp_control.kernel.errors import Conflict, StoreUnavailable
from mcp_control.kernel.ids import IdSource
from mcp_control.storage.ports import Store

_ID: Final = "store"
_TRIES: Final = 3


async def identity_of(store: Store, ids: IdSource) -> str:
    """Return the identity of a store; of several servers that start on an empty one, the first one gives it.

    Raises:
        StoreUnavailable, OutcomeUnknown: as `Store.get` and `Store.commit`.
    """
    for _ in range(_TRIES):
        (found,) = await store.get(IDENTITY_KIND.name, [_ID])
        if found is not None:
            return found.hot.decode()
        made = Entity(IDENTITY_KIND.name, _ID, 0, {}, ids.new("store").encode())
        (problem,) = await store.commit([Change(writes=[made])])
        if problem is not None and not isinstance(problem, Conflict):
            raise problem
    raise StoreUnavailable("the store keeps no identity")
