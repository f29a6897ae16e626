"""Charging budgets: usage and new attempts are committed together with every budget they are charged to.

What is charged to several budgets (its own, that of the task it is done for, the run's) is one change with the task, so it counts
wholly or not at all. On one server those with the same outermost budget come one after the other; between servers the versions
decide, and whoever was slower counts again on what is there then.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Final
from weakref import WeakValueDictionary

import msgspec
from msgspec.structs import replace

from mcp_control.kernel.changes import Fact
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict, Problem, StoreUnavailable
from mcp_control.storage.ports import Store
from mcp_control.tasks import budgets
from mcp_control.tasks.budget_model import BUDGET_KIND, Account, Over, Spent
from mcp_control.tasks.ledger import Group, Ledger, Move
from mcp_control.tasks.model import Task
from mcp_control.tasks.records import task_fact

TRIES: Final = 40
PAUSE_SECONDS: Final = 0.003


class Step(msgspec.Struct):
    """Something to commit for a task: its move, what is told of its usage, and what came of it."""

    move: Move
    told: Spent | None = None
    over: bool = False
    begins: bool = False
    outcome: Task | Over | Problem | None = None
    granted: bool = True


class Charging:
    """Commits what tasks use."""

    def __init__(self, store: Store, ledger: Ledger, clock: Clock) -> None:
        self._store = store
        self._ledger = ledger
        self._clock = clock
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def accounts(self, ids: Iterable[str]) -> dict[str, Account]:
        """Return the accounts there are, by the ids of their owners."""
        wanted = list(ids)
        if not wanted:
            return {}
        rows = await self._store.get(BUDGET_KIND.name, wanted)
        return {row.id: budgets.account_in(row) for row in rows if row is not None}

    async def charge(self, steps: Sequence[Step]) -> None:
        """Commit steps: those with the same outermost budget together, one such group at a time on this server."""
        groups: dict[str, list[Step]] = {}
        for step in steps:
            owners = budgets.owners(step.move.after)
            groups.setdefault(owners[-1] if owners else step.move.after.id, []).append(step)
        if len(groups) == 1:
            ((root, members),) = groups.items()
            await self._charge_group(root, members)
        elif groups:
            await asyncio.gather(*(self._charge_group(root, members) for root, members in groups.items()))

    async def _charge_group(self, root: str, steps: list[Step]) -> None:
        lock = self._locks.get(root)
        if lock is None:
            lock = self._locks[root] = asyncio.Lock()
        async with lock:
            for tried in range(TRIES):
                if tried:
                    await asyncio.sleep(PAUSE_SECONDS * tried)
                    steps = await self._still(steps)
                group, moved = await self._drafted(steps)
                if group is None:
                    return
                (outcome,) = await self._ledger.commit([group])
                if not isinstance(outcome, Problem):
                    for step, task in zip(moved, outcome, strict=True):
                        if not isinstance(step.outcome, Over):
                            step.outcome = task
                    return
                if not isinstance(outcome, Conflict):
                    for step in moved:
                        step.outcome = outcome
                    return
            for step in steps:
                step.outcome = StoreUnavailable("the budget changes too fast; say it again")

    async def _still(self, steps: list[Step]) -> list[Step]:
        """After a conflict: leave out what somebody else took, and go on from what the others are now."""
        left: list[Step] = []
        tasks = await self._ledger.load([step.move.after.id for step in steps], fresh=True)
        for step, task in zip(steps, tasks, strict=True):
            known = step.move.after
            if task is None:
                step.outcome = Conflict()
            elif task.version == known.version:
                left.append(step)
            elif step.begins or (task.lease is None or known.lease is None or task.lease.token != known.lease.token):
                step.outcome = Conflict()
            else:
                step.move = Move(task)
                left.append(step)
        return left

    async def _drafted(self, steps: Sequence[Step]) -> tuple[Group | None, list[Step]]:
        now = self._clock.now()
        before = await self.accounts({owner for step in steps for owner in budgets.owners(step.move.after)})
        accounts = dict(before)
        moved: list[Step] = []
        moves: list[Move] = []
        for step in steps:
            task = step.move.after
            run = task.links.run_id
            if run is not None and run not in accounts and not step.begins:
                accounts[run] = Account(id=run, tenant=task.tenant)
            drawn = [owner for owner in budgets.owners(task) if owner in accounts]
            after, facts = self._one(step, task, drawn, accounts, now)
            if after is not None:
                moved.append(step)
                moves.append(Move(after, [*step.move.facts, *facts]))
        if not moves:
            return None, []
        writes = [budgets.written(account) for owner, account in accounts.items() if account is not before.get(owner)]
        return Group(moves, writes), moved

    def _one(
        self, step: Step, task: Task, drawn: Sequence[str], accounts: dict[str, Account], now: int
    ) -> tuple[Task | None, list[Fact]]:
        """Charge one step to the accounts in hand; returns the task to write, None where there is nothing to write."""
        step.outcome, step.granted = None, True
        told = step.told
        if step.begins:
            # The attempt that is about to begin is not counted yet: what is left decides whether it may.
            ended = replace(task, attempt=task.attempt - 1, lease=None)
            _, added, held = budgets.booked(ended, None, now)
            step.outcome = budgets.used_up(budgets.charged(accounts[owner], added, held) for owner in drawn)
            if step.outcome is not None:
                return None, []
        said = told if told is None else budgets.holding(told)
        usage, added, held = budgets.booked(task, said, now, over=step.over)
        if told is not None and told.ask:
            after = [budgets.charged(accounts[owner], added, held) for owner in drawn]
            if not budgets.fits(after, told.ask):
                usage, added, held = budgets.booked(task, replace(told, ask={}), now, over=step.over)
            step.granted = budgets.granted(task.usage, usage, task.attempt, told)
        facts: list[Fact] = []
        for owner in drawn:
            account = budgets.charged(accounts[owner], added, held)
            if news := budgets.newly_warned(account):
                account = budgets.warned(account, news)
                facts += [
                    task_fact("task.budget_warned", task, "system", now, **budgets.told_of(each)) for each in news
                ]
            accounts[owner] = account
        mine = [accounts[owner] for owner in drawn]
        if not step.begins:
            step.outcome = budgets.passed(mine)
        usage = replace(usage, left=budgets.left(mine))
        return replace(task, usage=usage, ceiling=budgets.ceiling(mine, now)), facts
