"""A store with faults at given rates, after the fault list of Temporal's persistence tests (reliability, section 1).

Whole suites run over it: whatever the product promises must hold while its store times out, lies about failures and loses replies.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random
from typing import Final, Literal

from mcp_control.kernel.changes import Change, Entity, Kind, Query, StoredFact, Where
from mcp_control.kernel.errors import Conflict, OutcomeUnknown, Problem, StoreUnavailable
from mcp_control.storage.ports import Committed, Store

Fault = Literal["timeout", "executed", "lost", "unavailable", "conflict"]
_FAULTS: Final[tuple[Fault, ...]] = ("timeout", "executed", "lost", "unavailable", "conflict")


class FaultyStore:
    """A `Store` that passes calls on and sometimes does not.

    Faults of `commit`:
        timeout: StoreUnavailable, nothing was done.
        executed: OutcomeUnknown, although everything was done.
        lost: OutcomeUnknown, and nothing was done.
        unavailable: StoreUnavailable, nothing was done; the only one that reads suffer, too.
        conflict: one change of the call is answered with Conflict and not done; the others go through.

    Args:
        inner: the store that works.
        rates: the probability of each fault per call; what is not named does not happen.
        random: decides; seed it to repeat a run.

    Attributes:
        injected: how often each fault happened.
    """

    def __init__(self, inner: Store, rates: Mapping[Fault, float], random: Random) -> None:
        unknown = set(rates).difference(_FAULTS)
        if unknown:
            raise ValueError(f"no such faults: {sorted(unknown)}")
        self._inner = inner
        self._rates = rates
        self._random = random
        self.injected: Counter[Fault] = Counter()

    async def open(self, kinds: Sequence[Kind], committed: Committed) -> None:
        """Open the inner store; it calls `committed` itself."""
        await self._inner.open(kinds, committed)

    async def close(self) -> None:
        """Close the inner store."""
        await self._inner.close()

    async def commit(self, changes: Sequence[Change]) -> list[Problem | None]:
        """Commit, or fail as told."""
        if self._happens("timeout"):
            raise StoreUnavailable("injected: timed out before anything was done")
        if self._happens("unavailable"):
            raise StoreUnavailable("injected: unavailable")
        if self._happens("lost"):
            raise OutcomeUnknown("injected: the request was lost")
        if changes and self._happens("conflict"):
            return await self._commit_with_conflict(changes)
        outcomes = await self._inner.commit(changes)
        if self._happens("executed"):
            raise OutcomeUnknown("injected: done, and the reply was lost")
        return outcomes

    async def get(self, kind: str, ids: Sequence[str], cold: Sequence[str] = ()) -> list[Entity | None]:
        """Read, or be unavailable."""
        self._may_be_unavailable()
        return await self._inner.get(kind, ids, cold)

    async def find(self, kind: str, query: Query) -> list[Entity]:
        """Read, or be unavailable."""
        self._may_be_unavailable()
        return await self._inner.find(kind, query)

    async def count(self, kind: str, where: Sequence[Where], limit: int) -> int:
        """Read, or be unavailable."""
        self._may_be_unavailable()
        return await self._inner.count(kind, where, limit)

    async def facts(self, after: int, limit: int) -> list[StoredFact]:
        """Read, or be unavailable."""
        self._may_be_unavailable()
        return await self._inner.facts(after, limit)

    async def trim_facts(self, before_at: int, keep: int, limit: int) -> tuple[int, int]:
        """Trim, or be unavailable."""
        self._may_be_unavailable()
        return await self._inner.trim_facts(before_at, keep, limit)

    async def _commit_with_conflict(self, changes: Sequence[Change]) -> list[Problem | None]:
        at = self._random.randrange(len(changes))
        outcomes = await self._inner.commit([*changes[:at], *changes[at + 1 :]])
        return [*outcomes[:at], Conflict("injected: somebody else was faster"), *outcomes[at:]]

    def _may_be_unavailable(self) -> None:
        if self._happens("unavailable"):
            raise StoreUnavailable("injected: unavailable")

    def _happens(self, fault: Fault) -> bool:
        rate = self._rates.get(fault, 0.0)
        if rate and self._random.random() < rate:
            self.injected[fault] += 1
            return True
        return False
