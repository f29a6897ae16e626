"""What the tests of events share: a store with the broadcaster it reports to, and facts to tell."""

from collections.abc import Sequence
from pathlib import Path

from mcp_control.events.broadcaster import Broadcaster
from mcp_control.events.log import fact
from mcp_control.kernel.changes import Change, Fact, StoredFact
from mcp_control.kernel.errors import Problem
from mcp_control.storage.sqlite.store import SqliteStore

NOW = 1_800_000_000_000


def _fatal(problem: Problem) -> None:
    raise AssertionError(problem)


class World:
    """A store and the broadcaster it reports to."""

    def __init__(self, folder: Path, backlog: int = 1000) -> None:
        self.store = SqliteStore(folder, fatal=_fatal)
        self.broken: list[str] = []
        self.events = Broadcaster(self.store, backlog=backlog, broken=self.broken.append)

    async def open(self) -> None:
        await self.store.open([], self.events.committed)
        await self.events.start()

    async def tell(self, *facts: Fact) -> None:
        (problem,) = await self.store.commit([Change(facts=facts)])
        assert problem is None


def happened(type: str, subject: str = "task_1", run: str = "", tenant: str = "default", at: int = NOW) -> Fact:
    return fact(type, subject, "system", at, {"n": 1}, tenant=tenant, run=run)


def seqs(facts: Sequence[StoredFact]) -> list[int]:
    return [each.seq for each in facts]
