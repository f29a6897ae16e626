"""Budgets: what is counted, what is stopped, and what goes on when a budget is raised."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mcp_control.kernel.errors import BudgetExhausted, NotFound
from mcp_control.tasks import budgets
from mcp_control.tasks.budget_model import REPORTED, Account, Amounts, Budget, BudgetEdit, Spent
from mcp_control.tasks.model import Failure, Lease, Task, TaskState
from mcp_control.tasks.wire import Assignment, Done, Report, Used
from tests.tasks.test_transitions import a_task
from tests.tasks.world import ADMIN, Peer, World, two_servers_at, world_at

S = TaskState
AMOUNT = st.integers(0, 500)
REPORTS = st.lists(st.tuples(AMOUNT, AMOUNT, AMOUNT), min_size=1, max_size=8)


def _spent(number: int, calls: int, tokens: int, money: int) -> Spent:
    return Spent(number=number, calls=calls, tokens=tokens, money_micros=money)


@given(steps=REPORTS, data=st.data())
def test_totals_are_what_was_reported_however_often_and_in_whatever_order(
    steps: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """Reports are totals: repeated, late and out of order they add up to the last of them, in the task and in its budget."""
    totals: list[Spent] = []
    sums = (0, 0, 0)
    for number, step in enumerate(steps, 1):
        sums = (sums[0] + step[0], sums[1] + step[1], sums[2] + step[2])
        totals.append(_spent(number, *sums))
    extra = data.draw(st.lists(st.sampled_from(totals), max_size=6))
    arrived = data.draw(st.permutations([*totals, *extra]))
    task, account = a_task(S.RUNNING), Account(id="task_1")
    for told in arrived:
        usage, added, held = budgets.booked(task, told, task.state_at)
        task, account = replace(task, usage=usage), budgets.charged(account, added, held)
    expected = {name: value for name, value in zip(REPORTED, sums, strict=True) if value}
    for counted in (account.spent, task.usage.total if task.usage else {}):
        assert {name: counted[name] for name in REPORTED if name in counted} == expected
    assert account.spent["attempts"] == 1


@given(
    limit=st.integers(1, 2000),
    attempts=st.lists(st.lists(st.integers(1, 300), max_size=12), min_size=1, max_size=4),
    tasks=st.integers(1, 4),
)
def test_a_limit_is_passed_by_no_more_than_one_report_of_each_running_task(
    limit: int, attempts: list[list[int]], tasks: int
) -> None:
    """Whoever is found over the limit reports no more, so what is used is less than the limit and one report of each."""
    account = Account(id="run_1", budget=Budget(tokens=limit))
    running = {number: a_task(S.RUNNING) for number in range(tasks)}
    largest = 0
    for steps in attempts:
        alive = set(running)
        totals = dict.fromkeys(running, 0)
        for place, step in enumerate(steps):
            for number in sorted(alive):
                task = running[number]
                totals[number] += step
                largest = max(largest, step)
                usage, added, held = budgets.booked(task, Spent(number=place + 1, tokens=totals[number]), task.state_at)
                account = budgets.charged(account, added, held)
                running[number] = replace(task, usage=usage)
                if budgets.passed([account]) is not None:
                    alive.discard(number)
        assert account.spent.get("tokens", 0) <= limit + tasks * largest
        if budgets.used_up([account]) is not None:
            return
        for number, task in running.items():
            running[number] = replace(task, attempt=task.attempt + 1)


@given(
    limit=st.integers(0, 1000),
    asks=st.lists(st.tuples(st.integers(1, 400), st.integers(0, 400)), max_size=15),
)
def test_what_is_held_and_used_never_passes_the_limit_where_everybody_asks_first(
    limit: int, asks: list[tuple[int, int]]
) -> None:
    """Reserve before spend: what is granted and used within the grant stays within the limit, and everything held is given back."""
    account = Account(id="task_1", budget=Budget(tokens=limit))
    task = a_task(S.RUNNING)
    used = number = 0
    for wanted, actual in asks:
        number += 1
        asked = Spent(number=number, tokens=used, ask={"tokens": wanted})
        usage, added, held = budgets.booked(task, budgets.holding(asked), task.state_at)
        if not budgets.fits([budgets.charged(account, added, held)], asked.ask):
            continue
        account, task = budgets.charged(account, added, held), replace(task, usage=usage)
        used += min(actual, wanted)
        number += 1
        usage, added, held = budgets.booked(task, Spent(number=number, tokens=used), task.state_at)
        account, task = budgets.charged(account, added, held), replace(task, usage=usage)
        assert account.spent.get("tokens", 0) <= limit
        assert not account.held


def test_time_is_that_of_all_attempts_and_counts_once() -> None:
    """However often it is counted, the time of attempts is theirs: of those that ended, and of the one under way up to now."""
    task = a_task(S.RUNNING)
    total = 0
    for later in (1000, 1000, 2500):
        usage, added, _ = budgets.booked(task, None, task.state_at + later)
        total += added.get("wall_ms", 0)
        task = replace(task, usage=usage)
        assert total == later


def test_the_request_of_a_run_overrules_the_definition_limit_by_limit() -> None:
    """What the request names counts; what it does not name is what the definition says."""
    merged = budgets.merged(Budget(tokens=10, calls=5, on_exhausted="pause"), Budget(tokens=20))
    assert merged == Budget(tokens=20, calls=5, on_exhausted="pause")
    assert budgets.merged(None, None) is None


def test_adding_raises_only_what_is_limited() -> None:
    """What has no limit stays without one."""
    assert budgets.edited(Budget(tokens=10), BudgetEdit(add=Amounts(tokens=5, calls=3))) == Budget(tokens=15)
    assert budgets.edited(Budget(tokens=10), BudgetEdit(set=Budget(calls=2))) == Budget(tokens=10, calls=2)


# --- the component ------------------------------------------------------------------------------------------------


def _used(given: Assignment, number: int, **amounts: int) -> Used:
    return Used(task_id=given.task_id, lease_token=given.lease_token, spent=Spent(number=number, **amounts))


async def _failure(world: World, task: Task) -> Failure:
    found = (await world.task(task.id)).failure
    assert found is not None
    return found


async def _working(world: World, peer: Peer, task: Task) -> Assignment:
    async def there() -> bool:
        return task.id in peer.given

    await world.until(there)
    given = peer.given.pop(task.id)
    await peer.start(given)
    return given


async def test_the_report_that_passes_the_limit_stops_the_task(tmp_path: Path) -> None:
    """A warning at four fifths, then the typed end with what was used and allowed; nothing is tried again."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        task = await world.submit(budget={"tokens": 100})
        given = await _working(world, peer, task)
        assert given.budget == {"tokens": 100}
        assert (await peer.report(used=[_used(given, 1, tokens=80)])).refused == []
        assert (await peer.report(used=[_used(given, 2, tokens=100)])).refused == []
        (refusal,) = (await peer.report(used=[_used(given, 3, tokens=130)])).refused
        assert refusal.code == "budget-exhausted"
        ended = await world.task(task.id)
        assert (ended.state, ended.reason) == (S.FAILED, "budget-exhausted")
        assert ended.failure is not None
        assert ended.failure.cause == "budget"
        assert ended.failure.data == {"limit": "tokens", "used": 130, "allowed": 100, "owner": task.id}
        assert ended.attempts[-1].outcome == "budget"
        kinds = [stored.fact.type for stored in world.facts]
        assert kinds.count("task.budget_warned") == 1
        assert kinds[-2:] == ["task.budget_exhausted", "task.failed"]
        assert peer.cancelled == [task.id]
        assert not peer.live.held


async def test_what_ended_in_time_is_kept_even_if_it_used_too_much(tmp_path: Path) -> None:
    """A result that comes with the report that passes the limit is there, and paid for."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        task = await world.submit(budget={"tokens": 100})
        given = await _working(world, peer, task)
        done = Done(task_id=task.id, lease_token=given.lease_token, outcome="completed")
        assert (await peer.report(used=[_used(given, 1, tokens=130)], done=[done])).refused == []
        ended = await world.task(task.id)
        assert ended.state is S.COMPLETED
        assert (await world.spending.view(ADMIN, task.id)).used.tokens == 130


@pytest.mark.parametrize("policy", ["pause", "ask"])
async def test_a_task_that_waits_for_its_budget_goes_on_when_it_is_raised(tmp_path: Path, policy: str) -> None:
    """Its slot is free meanwhile, another task gets it; raised, it is given out again and what it used stays counted."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        task = await world.submit(budget={"tokens": 100, "on_exhausted": policy})
        given = await _working(world, peer, task)
        await peer.report(used=[_used(given, 1, tokens=130)])
        assert (await world.task(task.id)).state is S.INPUT_REQUIRED
        other = await world.submit()
        await peer.done(await _working(world, peer, other))
        await world.spending.once(world.clock.now())
        assert (await world.task(task.id)).state is S.INPUT_REQUIRED
        shown = await world.spending.edit(ADMIN, task.id, BudgetEdit(add=Amounts(tokens=50)))
        assert (shown.left, shown.exhausted) == ({"tokens": 20}, "")
        given = await _working(world, peer, task)
        assert (given.attempt, given.budget) == (2, {"tokens": 20})
        await peer.report(used=[_used(given, 1, tokens=15)])
        await peer.done(given)
        assert (await world.spending.view(ADMIN, task.id)).used.tokens == 145


async def test_no_ends_a_task_that_asked(tmp_path: Path) -> None:
    """Refused, it fails as it would have without asking; what does not wait cannot be refused."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        task = await world.submit(budget={"calls": 1, "on_exhausted": "ask"})
        given = await _working(world, peer, task)
        with pytest.raises(NotFound):
            await world.spending.refuse_more(ADMIN, task.id)
        await peer.report(used=[_used(given, 1, calls=2)])
        assert (await world.spending.refuse_more(ADMIN, task.id)).state is S.FAILED


async def test_attempts_and_time_are_counted_by_the_server(tmp_path: Path) -> None:
    """Attempts given out count whatever became of them; the time of all of them ends the last one."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        task = await world.submit(budget={"attempts": 2})
        for _ in range(2):
            await peer.done(await _working(world, peer, task), "released")

        async def failed() -> bool:
            return (await world.task(task.id)).final

        await world.until(failed)
        assert (await _failure(world, task)).data == {
            "limit": "attempts",
            "used": 2,
            "allowed": 2,
            "owner": task.id,
        }
        slow = await world.submit(budget={"wall_seconds": 10})
        given = await _working(world, peer, slow)
        world.advance(6)
        await peer.done(given, "released")
        given = await _working(world, peer, slow)
        assert given.budget == {"wall_seconds": 4.0}
        world.advance(3)
        await world.timekeeper.once()
        assert not (await world.task(slow.id)).final
        world.advance(1.5)
        await world.timekeeper.once()
        assert (await _failure(world, slow)).code == "budget-exhausted"


async def test_children_draw_from_the_budget_above_them(tmp_path: Path) -> None:
    """What a child uses counts for its parent too, stops it, and forbids further ones; none may be deeper than allowed."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=4)
        parent = await world.submit(budget={"tokens": 100, "depth": 1})
        await _working(world, peer, parent)
        keyed = await world.submit("other", parent_id=parent.id, idempotency_key="first")
        child = await world.submit(parent_id=parent.id)
        assert (child.links.depth, child.draws) == (1, [parent.id])
        given = await _working(world, peer, child)
        await peer.report(used=[_used(given, 1, tokens=90)])
        with pytest.raises(AssertionError, match="depth, used 2, allowed 1"):
            await world.submit(parent_id=child.id)
        await peer.report(used=[_used(given, 2, tokens=120)])
        assert (await _failure(world, child)).data == {
            "limit": "tokens",
            "used": 120,
            "allowed": 100,
            "owner": parent.id,
        }
        with pytest.raises(AssertionError, match="tokens, used 120, allowed 100"):
            await world.submit(parent_id=parent.id)
        again = await world.submit("other", parent_id=parent.id, idempotency_key="first")
        assert again.id == keyed.id, "what was accepted once is answered as it was then"


async def test_a_reservation_is_granted_once_and_ends_with_its_attempt(tmp_path: Path) -> None:
    """Asked twice it is held once; what does not fit is refused; whoever loses the attempt holds nothing any more."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        task = await world.submit(budget={"tokens": 100})
        given = await _working(world, peer, task)

        async def ask(number: int, used: int, held: int, more: int) -> bool:
            spent = Spent(number=number, tokens=used, held={"tokens": held} if held else {}, ask={"tokens": more})
            return (await world.spending.spend(peer.actor, task.id, given.lease_token, spent)).granted

        assert await ask(1, 0, 0, 60)
        assert await ask(1, 0, 0, 60), "its answer got lost"
        assert not await ask(2, 0, 60, 41)
        assert (await world.spending.view(ADMIN, task.id)).reserved.tokens == 60
        assert await ask(3, 50, 10, 40)
        assert not await ask(4, 60, 0, 41)
        assert not await ask(3, 50, 10, 40), "older than what was said since"
        assert (await world.spending.view(ADMIN, task.id)).reserved.tokens == 0
        with pytest.raises(BudgetExhausted):
            await ask(5, 101, 0, 1)


async def test_tasks_without_a_budget_are_counted_and_never_stopped(tmp_path: Path) -> None:
    """What is reported is shown on the task; nothing else is written for it."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        task = await world.submit()
        given = await _working(world, peer, task)
        assert given.budget is None
        await peer.report(used=[_used(given, 1, tokens=10**9)])
        shown = (await world.tasks.get(ADMIN, [task.id]))[0]
        assert shown is not None
        assert shown.usage is not None
        assert shown.usage.tokens == 10**9
        with pytest.raises(NotFound):
            await world.spending.view(ADMIN, task.id)


async def test_usage_survives_a_restart(tmp_path: Path) -> None:
    """What was acknowledged is counted after the server was started again."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        task = await world.submit(budget={"tokens": 100})
        await peer.report(used=[_used(await _working(world, peer, task), 1, tokens=70)])
    async with world_at(tmp_path) as world:
        assert (await world.spending.view(ADMIN, task.id)).used.tokens == 70


def test_a_lease_is_needed_to_hold() -> None:
    """A task that no agent has holds nothing."""
    task = a_task(S.RUNNING, lease=Lease(agent_id="a", instance_id="i", token="t", since=0))
    usage, _, _ = budgets.booked(task, Spent(number=1, held={"tokens": 5}), task.state_at)
    assert usage.told.held == {"tokens": 5}
    _, _, held = budgets.booked(replace(task, usage=usage, lease=None, state=S.QUEUED), None, task.state_at)
    assert held == {"tokens": -5}


async def test_a_budget_goes_with_its_task(tmp_path: Path) -> None:
    """When a task is removed after its time, so is its budget."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        task = await world.submit(budget={"tokens": 100})
        await peer.done(await _working(world, peer, task))
        assert await world.store.get("budget", [task.id]) != [None]
        world.advance(31 * 86_400)
        assert await world.retention.once() == 1
        assert await world.store.get("budget", [task.id]) == [None]


async def test_two_servers_count_what_both_hear_exactly_once(tmp_path: Path) -> None:
    """Reports of one budget at two servers at once: nothing is lost and nothing counts twice; raised at one, it goes on at the other."""
    async with two_servers_at(tmp_path) as (one, two):
        first, second = await one.agent("first", "parent"), await two.agent("second", "right")
        parent = await one.submit("parent", budget={"tokens": 1000, "on_exhausted": "pause"})
        await _working(one, first, parent)
        third = await one.agent("third", "left")
        left = await _working(one, third, await one.submit("left", parent_id=parent.id))
        right = await _working(two, second, await two.submit("right", parent_id=parent.id))
        assert left.budget == right.budget == {"tokens": 1000}
        for number in range(1, 26):
            await asyncio.gather(
                one.agents.report(third.live, Report(id=number, used=[_used(left, number, tokens=number * 7)])),
                two.agents.report(second.live, Report(id=number, used=[_used(right, number, tokens=number * 11)])),
            )
        assert (await one.spending.view(ADMIN, parent.id)).used.tokens == 25 * 18
        refused = (await two.agents.report(second.live, Report(id=99, used=[_used(right, 99, tokens=2000)]))).refused
        assert [refusal.code for refusal in refused] == ["budget-exhausted"]
        assert (await one.task(right.task_id)).state is S.INPUT_REQUIRED
        await one.spending.edit(ADMIN, parent.id, BudgetEdit(add=Amounts(tokens=5000)))
        await two.spending.once(two.clock.now())
        assert (await _working(two, second, await two.task(right.task_id))).attempt == 2
