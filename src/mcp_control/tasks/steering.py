"""What people steer tasks with, put together: single verbs, dead letters, operations, groups, and what keeps their traces small."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from mcp_control.agents.service import AgentManager
from mcp_control.configuration.groups import Retention
from mcp_control.kernel.changes import StoredFact
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.ids import IdSource
from mcp_control.storage.ports import Store
from mcp_control.tasks.control import TaskControl
from mcp_control.tasks.dead_letters import DeadLetters
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.groups import Groups
from mcp_control.tasks.ledger import Ledger
from mcp_control.tasks.operations import Operations
from mcp_control.tasks.parking import Parking
from mcp_control.tasks.service import TaskOrchestrator
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.spending import Spending

_DAY_MS: Final = 86_400_000
Once = Callable[[int], Awaitable[object]]


@dataclass(frozen=True)
class Steering:
    """See above."""

    control: TaskControl
    dead_letters: DeadLetters
    operations: Operations
    groups: Groups
    parking: Parking

    @classmethod
    def of(
        cls,
        store: Store,
        clock: Clock,
        ids: IdSource,
        manager: AgentManager,
        ledger: Ledger,
        settler: Settler,
        dispatcher: Dispatcher,
        tasks: TaskOrchestrator,
        spending: Spending,
        hearing: list[Callable[[Sequence[StoredFact]], None]],
    ) -> "Steering":
        """Put it together over the parts of tasks. `hearing`: who hears of all facts."""
        control = TaskControl(clock, manager, ledger, settler, dispatcher, tasks)
        dead_letters = DeadLetters(store, clock, ids, ledger, settler, spending)
        operations = Operations(store, clock, ids, manager, ledger, settler, control, dead_letters)
        groups = Groups(store, clock, ids, ledger, settler, tasks)
        hearing += [operations.heard, groups.heard]
        return cls(control, dead_letters, operations, groups, Parking(store, clock, ledger))

    def leading(self, keep: Retention) -> list[tuple[str, float, Once]]:
        """Return what the server that leads does again and again: name, pace in seconds, what."""
        tasks_ms = round(keep.tasks_days * _DAY_MS)
        return [
            ("operations", 0.25, self.operations.once),
            ("groups", 1.0, self.groups.keeper.once),
            ("parking", 1.0, self.parking.once),
            ("operations-retention", keep.interval_seconds, lambda now: self.operations.forget(now - tasks_ms)),
            ("groups-retention", keep.interval_seconds, lambda now: self.groups.forget(now - tasks_ms)),
        ]
