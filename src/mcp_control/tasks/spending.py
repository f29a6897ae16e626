"""What tasks use of their budgets: every report of usage and every new attempt is committed with the budgets it is charged to.

A budget is an entity beside its task or run. What is charged to several budgets (its own, that of the task it is done for, the run's)
is one change with the task, so a report counts wholly or not at all, and a repeated one adds nothing. Where a limit is found passed,
the task is stopped by a change of its own: after a crash in between, the next report or attempt finds the limit passed again.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.events.log import fact
from mcp_control.kernel.changes import Change, Query, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict, Invalid, LeaseSuperseded, NotFound, Problem
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Store
from mcp_control.tasks import budgets
from mcp_control.tasks.budget_model import (
    Account,
    Amounts,
    Budget,
    BudgetEdit,
    BudgetView,
    Over,
    SpendAnswer,
    Spent,
)
from mcp_control.tasks.charging import PAUSE_SECONDS, TRIES, Charging, Step
from mcp_control.tasks.exhaustion import answering, exhausting, problem_of
from mcp_control.tasks.ledger import Intent, Ledger, Move
from mcp_control.tasks.model import HELD_STATES, NO_LINKS, Links, Task, TaskState
from mcp_control.tasks.settling import Settler

_WAITING: Final = 500


class Told(msgspec.Struct, frozen=True):
    """What an agent says a task has used. `spent` None: nothing new, but its attempt ends here."""

    task_id: str
    lease_token: str
    spent: Spent | None
    over: bool = False


class Lineage(msgspec.Struct, frozen=True):
    """What a task inherits from the one it is done for."""

    links: Links
    draws: list[str]
    accounts: list[Account]

    def check(self) -> None:
        """Raise BudgetExhausted where what is inherited allows no further task, or none at this depth."""
        over = budgets.too_deep(self.accounts, self.links.depth) or budgets.used_up(self.accounts)
        if over is not None:
            raise problem_of(over)


NO_LINEAGE: Final = Lineage(NO_LINKS, [], [])


class Spending:
    """Charges budgets, and keeps tasks from going on that have none left."""

    def __init__(self, store: Store, ledger: Ledger, settler: Settler, clock: Clock) -> None:
        self._store = store
        self._ledger = ledger
        self._settler = settler
        self._clock = clock
        self._charging = Charging(store, ledger, clock)
        ledger.drew = self._ended
        settler.handing.budgets = self

    # --- for agents -----------------------------------------------------------------------------------------------

    async def told(self, reports: Sequence[Told], actor: str) -> dict[str, Over]:
        """Record what agents say was used; returns the tasks that were stopped for it. What is said of others' tasks is left out.

        Raises:
            Problem: of the store; nothing is known to be recorded.
        """
        steps = await self._steps(reports)
        await self._charging.charge(steps)
        for step in steps:
            if isinstance(step.outcome, Problem) and step.outcome.status >= 500:
                raise step.outcome
        return await self._stop_all([step for step in steps if not step.over], actor)

    async def _steps(self, reports: Sequence[Told]) -> list[Step]:
        tasks = await self._ledger.load([report.task_id for report in reports])
        steps: list[Step] = []
        for report, task in zip(reports, tasks, strict=True):
            if task is None or (report.spent is None and not task.draws):
                continue
            if task.lease is None or not task.lease.opens(report.lease_token):
                if not self._ledger.shared:
                    continue
                (task,) = await self._ledger.load([report.task_id], fresh=True)
                if task is None or task.lease is None or not task.lease.opens(report.lease_token):
                    continue
            steps.append(Step(Move(task), report.spent, report.over))
        return steps

    async def spend(self, actor: Actor, task_id: str, lease_token: str, spent: Spent) -> SpendAnswer:
        """Record what the attempt under way has used in all and hold what it asks for, if there is so much left.

        Raises:
            LeaseSuperseded: the lease presented is not the live one.
            BudgetExhausted: a limit is passed; the task was stopped.
        """
        allow(actor, "tasks.report", actor.id)
        (task,) = await self._ledger.load([task_id], fresh=True)
        if task is None or task.tenant != actor.tenant:
            raise NotFound("no such task")
        if task.lease is None or task.lease.agent_id != actor.id or not task.lease.opens(lease_token):
            raise LeaseSuperseded("the lease is not the live one")
        step = Step(Move(task), spent)
        await self._charging.charge([step])
        stopped = await self._stop_all([step], actor.id)
        if stopped:
            raise problem_of(stopped[task_id])
        if isinstance(step.outcome, Problem):
            raise step.outcome
        left = step.outcome.usage.left if isinstance(step.outcome, Task) and step.outcome.usage is not None else {}
        return SpendAnswer(granted=step.granted, left=budgets.shown(left))

    async def _stop_all(self, steps: Sequence[Step], actor: str) -> dict[str, Over]:
        over = {step.move.after.id: step.outcome for step in steps if isinstance(step.outcome, Over)}
        if over:
            now = self._clock.now()
            await self._settler.settle(
                [Intent(task_id, exhausting(each, actor, now)) for task_id, each in over.items()]
            )
        return over

    # --- before an attempt ----------------------------------------------------------------------------------------

    async def begin(self, moves: Sequence[Move]) -> list[Task | Over | Problem]:
        """Commit new attempts of tasks that draw from budgets, as far as something is left; returns each as it is now, or why not."""
        steps = [Step(move, begins=True) for move in moves]
        await self._charging.charge(steps)
        return [Conflict() if step.outcome is None else step.outcome for step in steps]

    async def refuse(self, over: Mapping[str, Over]) -> None:
        """Keep waiting tasks from being given out that have nothing left."""
        now = self._clock.now()
        await self._settler.settle([Intent(task_id, exhausting(each, "system", now)) for task_id, each in over.items()])

    async def lineage(self, tenant: str, parents: Iterable[str]) -> dict[str, Lineage]:
        """Return what tasks done for these inherit; ids that are no task of this tenant are left out."""
        ids = list(dict.fromkeys(parents))
        found: dict[str, Lineage] = {}
        for task in await self._ledger.load(ids, fresh=True):
            if task is None or task.tenant != tenant:
                continue
            links = Links(parent_id=task.id, root_id=task.links.root_id or task.id, depth=task.links.depth + 1)
            draws = budgets.owners(task)
            found[task.id] = Lineage(links, draws, list((await self._charging.accounts(draws)).values()))
        return found

    # --- for people -----------------------------------------------------------------------------------------------

    async def view(self, actor: Actor, owner: str) -> BudgetView:
        """Return the budget of a task or run and what was used of it. Raises NotFound where it has none."""
        allow(actor, "budgets.get", owner)
        return budgets.budget_view(await self._account(actor, owner))

    async def own(self, task: Task) -> Budget | None:
        """Return the limits of a task itself."""
        account = None if task.id not in task.draws else (await self._charging.accounts([task.id])).get(task.id)
        return None if account is None else account.budget

    async def used(self, owner: str) -> tuple[Budget | None, Amounts | None]:
        """Return the limits of a run and what its tasks told they used; None where there is nothing to tell."""
        account = (await self._charging.accounts([owner])).get(owner)
        if account is None:
            return None, None
        return account.budget if budgets.limits(account.budget) or account.budget.depth is not None else None, (
            budgets.amounts(account.spent) if account.spent else None
        )

    async def edit(self, actor: Actor, owner: str, edit: BudgetEdit) -> BudgetView:
        """Set or raise limits; what waited for it goes on.

        Raises:
            NotFound: there is no such budget.
            Invalid: a limit is out of its range.
        """
        allow(actor, "budgets.edit", owner)
        for tried in range(TRIES):
            account = await self._account(actor, owner)
            budget = budgets.edited(account.budget, edit)
            if errors := budgets.budget_errors("#/set", budget):
                raise Invalid(errors[0].detail, errors=errors)
            after = budgets.warned(replace(account, budget=budget), ())
            now = self._clock.now()
            run = owner if owner.startswith("run_") else ""
            changed = fact(
                "budget.changed", owner, actor.id, now, msgspec.to_builtins(budget), tenant=account.tenant, run=run
            )
            (problem,) = await self._store.commit([Change([budgets.written(after)], (), [changed])])
            if problem is None:
                break
            if not isinstance(problem, Conflict):
                raise problem
            await asyncio.sleep(PAUSE_SECONDS * tried)
        else:
            raise Conflict("the budget changes too fast; try again")
        await self._go_on([owner], actor.id)
        await self._book_anew(owner)
        return budgets.budget_view(replace(after, version=after.version + 1))

    async def refuse_more(self, actor: Actor, task_id: str) -> Task:
        """Say no to a task that waits for its budget: it fails as if the budget said `stop`. Raises NotFound."""
        allow(actor, "budgets.edit", task_id)
        (task,) = await self._ledger.load([task_id], fresh=True)
        if task is None or task.tenant != actor.tenant:
            raise NotFound("no such task")
        over = budgets.used_up((await self._charging.accounts(task.draws)).values())
        if over is None or task.state is not TaskState.INPUT_REQUIRED or task.reason != budgets.CODE:
            raise NotFound("the task does not wait for its budget")
        (result,) = await self._settler.settle(
            [Intent(task_id, exhausting(over, actor.id, self._clock.now(), stop=True))]
        )
        if isinstance(result, Problem):
            raise result
        return result

    async def _account(self, actor: Actor, owner: str) -> Account:
        account = (await self._charging.accounts([owner])).get(owner)
        if account is None or account.tenant != actor.tenant:
            raise NotFound("there is no such budget")
        return account

    async def _go_on(self, ids: Sequence[str], actor: str) -> None:
        now = self._clock.now()
        tasks = [
            task
            for task in await self._ledger.load([each for each in ids if each.startswith("task_")], fresh=True)
            if task is not None and task.state is TaskState.INPUT_REQUIRED and task.reason == budgets.CODE
        ]
        accounts = await self._charging.accounts({owner for task in tasks for owner in task.draws})
        free = [
            task.id
            for task in tasks
            if budgets.used_up(accounts[each] for each in task.draws if each in accounts) is None
        ]
        if free:
            await self._settler.settle([Intent(task_id, answering(actor, now)) for task_id in free])

    async def _book_anew(self, owner: str) -> None:
        """Tell what is under way of the time that is left now."""
        if owner.startswith("run_"):
            held = [state.value for state in HELD_STATES]
            rows = await self._store.find(
                "task", Query(where=[Where("run", "eq", owner), Where("state", "in", held)], limit=_WAITING)
            )
            tasks = self._ledger.readable(rows)
        else:
            tasks = [task for task in await self._ledger.load([owner], fresh=True) if task is not None]
        await self._charging.charge([Step(Move(task)) for task in tasks if task.lease is not None and task.draws])

    # --- what time brings -----------------------------------------------------------------------------------------

    async def once(self, now: int) -> int:
        """Let tasks go on whose budget was raised meanwhile, wherever that was; returns how many waited."""
        after: list[str] | None = None
        waiting = 0
        while True:
            where = [Where("state", "eq", TaskState.INPUT_REQUIRED.value)]
            rows = await self._store.find("task", Query(where=where, after=after, limit=_WAITING))
            waiting += len(rows)
            await self._go_on([row.id for row in rows], "system")
            if len(rows) < _WAITING:
                return waiting
            after = [rows[-1].id]

    def _ended(self, task: Task) -> None:
        """Hear of a task that ended: what its last attempt took is charged, where that did not come with the agent's report."""
        _, added, held = budgets.booked(task, None, self._clock.now(), over=True)
        if added or held:
            self._settler.handing.background.begin(self._charging.charge([Step(Move(task), over=True)]))
