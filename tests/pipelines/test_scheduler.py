"""Schedules over a real store: one fire per slot whoever fires it, overlap, backfill, history."""

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_control.kernel.changes import Change, Query, Where
from mcp_control.kernel.clock import to_datetime
from mcp_control.kernel.errors import (
    Invalid,
    InvalidSchedule,
    InvalidTransition,
    NameTaken,
    NotFound,
    OutcomeUnknown,
    Problem,
    StoreUnavailable,
    VersionConflict,
)
from mcp_control.pipelines import schedules
from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.firing import Firing
from mcp_control.pipelines.model import RunState
from mcp_control.pipelines.records import read_run
from mcp_control.pipelines.schedule_model import BackfillRequest, Fire, FireView, Schedule, ScheduleSpec
from mcp_control.pipelines.schedule_records import schedule_view
from mcp_control.pipelines.scheduler import Scheduler
from mcp_control.pipelines.timekeeping import ScheduleKeeper, ScheduleRetention
from mcp_control.pipelines.transitions import SCHEDULE_TRANSITIONS
from mcp_control.tasks.model import Task, TaskState
from mcp_control.tasks.records import read as read_task
from tests.pipelines.world import ANNA, World, world

MINUTE, HOUR = 60.0, 3600.0
TASK = {"type": "work"}


class Timed:
    """A world with schedules in it."""

    def __init__(self, here: World, **options: int) -> None:
        self.here = here
        self.firing = Firing(here.store, here.clock, here.engine, here.settler)
        self.scheduler = Scheduler(here.store, here.clock, here.ids, self.firing)
        self.keeper = ScheduleKeeper(here.store, here.clock, self.firing, **options)

    async def create(self, **fields: object) -> Schedule:
        """Keep a schedule."""
        spec = msgspec.convert({"name": "s"} | fields, ScheduleSpec)
        return (await self.scheduler.create(ANNA, spec))[0]

    async def get(self) -> Schedule:
        """Return the schedule as it is."""
        return await self.scheduler.get(ANNA, "s")

    async def once(self) -> None:
        """Let the leader look, now."""
        await self.keeper.once(self.here.clock.now())

    async def later(self, seconds: float) -> None:
        """Let time pass and the leader look."""
        self.here.clock.advance(seconds)
        await self.once()

    async def fires(self) -> list[FireView]:
        """Return the history, oldest slot first."""
        return list(reversed((await self.scheduler.fires(ANNA, "s", limit=500)).items))

    async def outcomes(self) -> list[str]:
        """Return what became of the slots, oldest first."""
        return [fire.outcome for fire in await self.fires()]

    async def tasks(self) -> list[Task]:
        """Return all tasks."""
        return [read_task(row) for row in await self.here.store.find("task", Query(limit=1000))]


async def made_pipeline(here: World) -> None:
    """Define the pipeline `small`, with the parameter `day`."""
    p = PipelineBuilder("small")
    day = p.param("day")
    p.stage("a", "work", with_={"day": day})
    await here.engine.create(ANNA, p.build())


@asynccontextmanager
async def timed(folder: Path, **options: int) -> AsyncIterator[Timed]:
    """Open a world with schedules over a folder."""
    async with world(folder) as here:
        await made_pipeline(here)
        yield Timed(here, **options)


RUN = {"pipeline": "small", "params": {"day": "${{ run.date }}"}}


async def test_a_slot_starts_a_run_with_its_own_moment(tmp_path: Path) -> None:
    """The run is labelled with its schedule, sees the slot in its parameters, and is what the history names."""
    async with timed(tmp_path) as it:
        made = await it.create(cron="30 2 * * *", timezone="Europe/Berlin", run=RUN)
        await it.later(25 * HOUR)
        (fire,) = await it.fires()
        assert fire.outcome == "started"
        row = (await it.here.store.get("run", [fire.target], ("params",)))[0]
        assert row is not None
        run = read_run(row)
        assert (run.labels["schedule"], run.origin.protocol, run.tenant) == ("s", "schedule", "default")
        local = fire.slot + timedelta(hours=1)  # winter
        assert msgspec.json.decode(row.cold["params"]) == {"day": f"{local:%Y-%m-%d}"}
        told = [stored.fact for stored in it.here.facts if stored.fact.subject == made.id]
        assert [fact.type for fact in told] == ["schedule.created", "schedule.fired"]
        assert msgspec.json.decode(told[1].data)["target"] == run.id == told[1].run


async def test_a_slot_submits_a_task(tmp_path: Path) -> None:
    """An interval fires at every whole number of intervals, with the payload made for the slot."""
    async with timed(tmp_path) as it:
        await it.create(every=60, overlap="allow", task={**TASK, "payload": ["${{ run.slot }}", 7], "priority": "high"})
        for _ in range(3):
            await it.later(MINUTE)
        tasks = await it.tasks()
        assert [task.state for task in tasks] == [TaskState.QUEUED] * 3
        assert {task.priority for task in tasks} == {70}
        row = (await it.here.store.get("task", [tasks[0].id], ("payload",)))[0]
        assert row is not None
        slot = (await it.fires())[0].slot.isoformat().replace("+00:00", "Z")
        assert msgspec.json.decode(row.cold["payload"]) == [slot, 7]


async def test_a_single_moment_fires_once_and_is_over(tmp_path: Path) -> None:
    """`at` starts one task, then the schedule is finished and goes after its time with its history."""
    async with timed(tmp_path) as it:
        moment = to_datetime(it.here.clock.now() + 90_000)
        await it.create(at=moment, task=TASK)
        await it.later(60)
        assert await it.tasks() == []
        for _ in range(3):
            await it.later(60)
        assert len(await it.tasks()) == 1
        assert (await it.get()).finished_at is not None
        retention = ScheduleRetention(it.here.store, keep_ms=60_000_000)
        assert await retention.once(it.here.clock.now()) == 0
        it.here.clock.advance(60_001)
        assert await retention.once(it.here.clock.now()) == 1
        with pytest.raises(NotFound):
            await it.get()
        assert await it.here.store.find("fire", Query()) == []


@pytest.mark.parametrize("target", [{"run": RUN}, {"task": TASK}], ids=["run", "task"])
async def test_two_leaders_fire_a_slot_once(target: dict[str, Any], tmp_path: Path) -> None:
    """Two servers that both think they lead, at the same moment, slot after slot."""
    async with timed(tmp_path) as one:
        two = Timed(one.here)
        await one.create(every=60, overlap="allow", **target)
        for _ in range(20):
            one.here.clock.advance(MINUTE)
            await asyncio.gather(one.once(), two.once(), one.once(), two.once())
        fires = await one.fires()
        assert [fire.outcome for fire in fires] == ["started"] * 20
        kind = next(iter(target))
        rows = await one.here.store.find(kind, Query(limit=1000))
        assert sorted(row.id for row in rows) == sorted(fire.target for fire in fires)


async def test_a_clock_that_jumps_fires_no_slot_twice(tmp_path: Path) -> None:
    """An hour forth, two back, and on: every slot fires at most once, and after the jump back it goes on when its time comes."""
    async with timed(tmp_path) as it:
        await it.create(every=600, overlap="allow", catch_up="all", task=TASK)
        begin = it.here.clock.now()
        await it.later(600)
        it.here.clock.set_wall(it.here.clock.now() + 3_600_000)
        await it.once()
        it.here.clock.set_wall(it.here.clock.now() - 7_200_000)
        for _ in range(30):
            await it.later(600)
        slots = [fire.slot for fire in await it.fires()]
        assert len(slots) == len(set(slots)) == len(await it.tasks())
        passed = (it.here.clock.now() - begin) // 600_000
        assert slots == [to_datetime(begin + (place + 1) * 600_000) for place in range(passed)]


class Doubtful:
    """A store whose commits may be lost, or done without the answer arriving, as when a server dies in between."""

    def __init__(self, store: Any, script: list[str]) -> None:
        self._store = store
        self._script = script

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def commit(self, changes: Sequence[Change]) -> list[Problem | None]:
        """Commit as the script says."""
        step = self._script.pop(0) if self._script else "well"
        if step == "lost":
            raise StoreUnavailable
        outcomes: list[Problem | None] = await self._store.commit(changes)
        if step == "unknown":
            raise OutcomeUnknown
        return outcomes


@pytest.mark.parametrize("script", [["lost"], ["unknown"], ["lost", "unknown", "lost", "unknown"]], ids="-".join)
@pytest.mark.parametrize("target", [{"run": RUN}, {"task": TASK}], ids=["run", "task"])
async def test_a_fire_that_broke_off_happens_once(script: list[str], target: dict[str, Any], tmp_path: Path) -> None:
    """Whether the commit was lost or only its answer: after looking again there is one fire for each slot."""
    async with timed(tmp_path) as it:
        await it.create(every=60, overlap="allow", **target)
        whole = it.here.store
        for _ in range(3):
            it.here.clock.advance(MINUTE)
            it.here.store = Doubtful(whole, list(script))  # type: ignore[assignment]  # the same methods
            it.here.restart()
            doubtful = Timed(it.here)
            for _ in range(len(script) + 1):
                with suppress(StoreUnavailable, OutcomeUnknown):
                    await doubtful.once()
            await it.here.settled()
        it.here.store = whole
        fires = await it.fires()
        assert [fire.outcome for fire in fires] == ["started"] * 3
        rows = await whole.find(next(iter(target)), Query(limit=1000))
        assert sorted(row.id for row in rows) == sorted(fire.target for fire in fires)


async def test_a_slot_is_skipped_while_the_earlier_run_goes_on(tmp_path: Path) -> None:
    """`skip`: the history says so, and the first slot after the end fires again."""
    async with timed(tmp_path) as it:
        await it.create(every=60, run=RUN)
        for _ in range(3):
            await it.later(MINUTE)
        (run,) = (await it.here.engine.runs(ANNA)).items
        assert await it.outcomes() == ["started", "skipped", "skipped"]
        await it.here.finish(await it.here.tasks(await it.here.engine.run(ANNA, run.id)))
        await it.later(MINUTE)
        assert await it.outcomes() == ["started", "skipped", "skipped", "started"]


async def test_one_slot_waits_for_the_earlier_run(tmp_path: Path) -> None:
    """`queue-one`: the first slot that comes meanwhile starts as soon as the run has ended, later ones are skipped."""
    async with timed(tmp_path) as it:
        await it.create(every=60, overlap="queue-one", run=RUN)
        for _ in range(3):
            await it.later(MINUTE)
        assert await it.outcomes() == ["started", "queued", "skipped"]
        (run,) = (await it.here.engine.runs(ANNA)).items
        await it.here.finish(await it.here.tasks(await it.here.engine.run(ANNA, run.id)))
        await it.later(1)
        assert await it.outcomes() == ["started", "started", "skipped"]
        assert (await it.get()).queued is None


@pytest.mark.parametrize("target", [{"run": RUN}, {"task": TASK}], ids=["run", "task"])
async def test_a_new_slot_cancels_the_earlier_work(target: dict[str, Any], tmp_path: Path) -> None:
    """`cancel-previous`: the earlier work is asked to end, and the new one starts when it has."""
    async with timed(tmp_path) as it:
        await it.create(every=60, overlap="cancel-previous", **target)
        for _ in range(3):
            await it.later(MINUTE)
            await it.here.settled()
            await it.once()
        assert await it.outcomes() == ["started"] * 3
        kind = next(iter(target))
        states = [str(row.index["state"]) for row in await it.here.store.find(kind, Query())]
        assert Counter(states)["cancelled"] == 2
        assert len(states) == 3


async def test_a_target_that_is_wrong_fails_its_slot_and_not_the_schedule(tmp_path: Path) -> None:
    """A new version of the pipeline wants another parameter: the slot is recorded as failed with the reason, the next one is tried."""
    async with timed(tmp_path) as it:
        await it.create(every=60, overlap="allow", run=RUN)
        p = PipelineBuilder("small")
        p.param("day")
        p.param("more")
        p.stage("a", "work")
        await it.here.engine.create(ANNA, p.build())
        await it.later(MINUTE)
        await it.later(MINUTE)
        fires = await it.fires()
        assert [(fire.outcome, fire.reason) for fire in fires] == [("failed", "invalid")] * 2
        assert "more" in fires[0].message
        assert (await it.get()).fired == 0


async def test_what_cannot_fire_is_refused_when_it_is_made(tmp_path: Path) -> None:
    """A time that never comes, an unknown pipeline, a missing parameter, a wrong expression, no target: each with its place."""
    async with timed(tmp_path) as it:
        for timing in ({"cron": "61 * * * *"}, {"cron": "@every -1s"}, {"cron": "0 0 30 2 *"}, {"every": -1}):
            with pytest.raises(InvalidSchedule):
                await it.create(**timing, task=TASK)
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"run": {"pipeline": "none"}}, "#/run/pipeline"),
            ({"run": {"pipeline": "small"}}, "#/run/params/day"),
            ({"run": {"pipeline": "small", "params": {"day": "${{ stages.a.output }}"}}}, "#/run/params"),
            ({"task": {"type": "", "payload": 1}}, "#/task/type"),
            ({"task": {"type": "work", "priority": 200}}, "#/task/priority"),
            ({}, "#/run"),
            ({"run": RUN, "task": TASK}, "#/run"),
            ({"task": TASK, "catch_up_limit": 0}, "#/catch_up_limit"),
            ({"task": {"type": "work", "payload": "x" * 70_000}}, "#"),
        ]
        for fields, pointer in wrong:
            with pytest.raises(Invalid) as refused:
                await it.create(every=60, **fields)
            assert refused.value.errors[0].pointer == pointer
        assert (await it.scheduler.list(ANNA)).items == []


async def test_making_it_again_changes_nothing_and_another_needs_an_edit(tmp_path: Path) -> None:
    """The same spec is the same schedule; another one of the name is refused; an edit needs the version it is based on."""
    async with timed(tmp_path) as it:
        made = await it.create(every=60, task=TASK)
        assert (await it.create(every=60, task=TASK)).id == made.id
        with pytest.raises(NameTaken):
            await it.create(every=61, task=TASK)
        spec = msgspec.structs.replace(made.spec, every=None, cron="* * * * *")
        with pytest.raises(VersionConflict):
            await it.scheduler.replace(ANNA, "s", spec, made.version + 1)
        edited = await it.scheduler.replace(ANNA, "s", spec, made.version)
        assert edited.spec.cron == "* * * * *"
        await it.later(MINUTE)
        assert len(await it.tasks()) == 1


async def test_a_paused_schedule_fires_nothing_and_goes_on_with_the_next_slot(tmp_path: Path) -> None:
    """Slots that pass during a pause are not caught up with; they can be backfilled."""
    async with timed(tmp_path) as it:
        await it.create(every=60, overlap="allow", catch_up="all", task=TASK)
        begin = it.here.clock.now()
        await it.scheduler.pause(ANNA, "s", "maintenance")
        for _ in range(3):
            await it.later(MINUTE)
        await it.scheduler.resume(ANNA, "s")
        await it.later(MINUTE)
        assert [fire.slot for fire in await it.fires()] == [to_datetime(begin + 4 * 60_000)]
        request = BackfillRequest(since=to_datetime(begin + 1), to=to_datetime(begin + 600_000), width=5)
        shown = await it.scheduler.backfill(ANNA, "s", request)
        assert shown.slots == [to_datetime(begin + place * 60_000) for place in (1, 2, 3)]
        await it.later(1)
        assert [fire.source for fire in await it.fires()] == ["backfill"] * 3 + ["schedule"]


async def test_the_states_of_a_schedule_follow_its_table(tmp_path: Path) -> None:
    """Paused, resumed, finished, edited, backfilled: each verb leads where the table says, and nowhere else."""
    seen: set[tuple[str, str, str]] = set()
    async with timed(tmp_path) as it:
        begin = it.here.clock.now()
        made = await it.create(every=60, overlap="allow", ends_at=to_datetime(begin + 150_000), task=TASK)

        async def then(verb: str, doing: Awaitable[object]) -> str:
            before = schedule_view(await it.get()).state
            await doing
            after = schedule_view(await it.get()).state
            if before != after:
                seen.add((verb, before, after))
            return after

        assert await then("pause", it.scheduler.pause(ANNA, "s")) == "paused"
        assert await then("pause", it.scheduler.pause(ANNA, "s")) == "paused"
        await it.later(MINUTE + 1)
        assert await then("resume", it.scheduler.resume(ANNA, "s")) == "active"
        assert await then("finish", it.later(MINUTE)) == "finished"
        assert await then("pause", it.scheduler.pause(ANNA, "s")) == "paused"
        assert await then("resume", it.scheduler.resume(ANNA, "s")) == "finished"
        request = BackfillRequest(since=to_datetime(begin + 1), to=to_datetime(begin + 120_000), width=5)
        assert await then("backfill", it.scheduler.backfill(ANNA, "s", request)) == "active"
        await it.later(1)
        await it.here.finish([task for task in await it.tasks() if not task.final])
        assert await then("finish", it.later(MINUTE)) == "finished"
        spec = msgspec.structs.replace(made.spec, ends_at=None)
        version = (await it.get()).version
        assert await then("edit", it.scheduler.replace(ANNA, "s", spec, version)) == "active"
    assert seen == {
        (verb, before, after)
        for verb, moves in SCHEDULE_TRANSITIONS.items()
        for before, targets in moves.items()
        for after in targets
    }


async def test_a_backfill_is_as_wide_as_it_was_asked_to_be(tmp_path: Path) -> None:
    """Never more than `width` of its runs go on at once, each missed slot fires once, fired ones stay as they are."""
    async with timed(tmp_path) as it:
        await it.create(every=60, catch_up="none", overlap="allow", run=RUN)
        begin = it.here.clock.now()
        await it.later(MINUTE)  # fires slot 1
        await it.here.finish(await it.here.tasks(await it.here.engine.run(ANNA, (await it.fires())[0].target)))
        await it.later(8.9 * MINUTE)  # 2 to 9 are missed, and 9 is late
        request = BackfillRequest(since=to_datetime(begin + 1), to=to_datetime(begin + 10 * 60_000), width=3)
        dry = await it.scheduler.backfill(ANNA, "s", msgspec.structs.replace(request, dry_run=True))
        assert dry.slots is not None
        assert len(dry.slots) == 8
        await it.scheduler.backfill(ANNA, "s", request)
        with pytest.raises(InvalidTransition):
            await it.scheduler.backfill(ANNA, "s", request)
        ended = 0
        for _ in range(20):
            await it.once()
            going = [run for run in (await it.here.engine.runs(ANNA, limit=100)).items if run.state is RunState.RUNNING]
            assert len(going) <= 3
            if not going:
                break
            await it.here.finish(await it.here.tasks(await it.here.engine.run(ANNA, going[0].id)))
            ended += 1
        assert ended == 8
        assert (await it.get()).backfill is None
        slots = [fire.slot for fire in await it.fires()]
        assert slots == [to_datetime(begin + place * 60_000) for place in range(1, 10)]
        assert "schedule.backfilled" in [stored.fact.type for stored in it.here.facts]
        again = await it.scheduler.backfill(ANNA, "s", request)
        assert again.slots == []


async def test_a_trigger_by_hand_starts_at_once_and_uses_up_no_slot(tmp_path: Path) -> None:
    """Repeated with the same key it is the same fire; the slots go on as planned."""
    async with timed(tmp_path) as it:
        await it.create(every=60, overlap="allow", task=TASK)
        first = await it.scheduler.trigger(ANNA, "s", "k")
        it.here.clock.advance(5)
        assert await it.scheduler.trigger(ANNA, "s", "k") == first
        assert (await it.scheduler.trigger(ANNA, "s")).id != first.id
        await it.later(55)
        assert [fire.source for fire in await it.fires()] == ["manual", "manual", "schedule"]
        assert len(await it.tasks()) == 3


async def test_the_history_is_bounded_and_fired_slots_stay_fired(tmp_path: Path) -> None:
    """Old fires go, and a backfill over all of the time still fires nothing a second time."""
    async with timed(tmp_path, history=20) as it:
        await it.create(every=60, overlap="allow", catch_up="none", task=TASK)
        begin = it.here.clock.now()
        fired = 0
        for _ in range(130):
            await it.later(MINUTE)
            fired += 1
        await it.later(2.9 * MINUTE)  # two slots are missed, the third is not
        await it.later(0.1 * MINUTE)
        fired += 1
        for _ in range(130):
            await it.later(MINUTE)
            fired += 1
        kept = await it.here.store.count("fire", [Where("schedule", "eq", (await it.get()).id)], 1000)
        assert kept <= 40
        request = BackfillRequest(since=to_datetime(begin + 1), to=to_datetime(it.here.clock.now()), width=50)
        shown = await it.scheduler.backfill(ANNA, "s", request)
        assert shown.slots is not None
        assert len(shown.slots) == (it.here.clock.now() - begin) // 60_000 - fired == 2
        await it.later(1)
        assert len(await it.tasks()) == fired + len(shown.slots)


async def test_a_deleted_schedule_is_gone_and_its_name_is_free(tmp_path: Path) -> None:
    """It fires no more, another one may take the name at once, and its history goes."""
    async with timed(tmp_path) as it:
        made = await it.create(every=60, task=TASK)
        await it.later(MINUTE)
        await it.scheduler.delete(ANNA, "s")
        with pytest.raises(NotFound):
            await it.scheduler.get(ANNA, made.id)
        again = await it.create(every=60, task=TASK)
        assert again.id != made.id
        assert await ScheduleRetention(it.here.store, keep_ms=10**10).once(it.here.clock.now()) == 1
        assert await it.here.store.count("fire", [Where("schedule", "eq", made.id)], 10) == 0
        assert (await it.get()).id == again.id


def test_records_are_small() -> None:
    """A fire costs little more than its facts."""
    fire = Fire(id="f", version=1, schedule_id="s", slot=1, at=1, source="schedule", outcome="started")
    assert len(msgspec.json.encode(fire)) < 200


async def test_an_edit_of_the_beginning_counts_from_now(tmp_path: Path) -> None:
    """A schedule that was to begin much later, and is to begin at once after all, fires its next slot."""
    async with timed(tmp_path) as it:
        far = to_datetime(it.here.clock.now() + 10**9)
        made = await it.create(every=60, starts_at=far, task=TASK)
        await it.later(10 * MINUTE)
        assert await it.tasks() == []
        spec = msgspec.structs.replace(made.spec, starts_at=None)
        await it.scheduler.replace(ANNA, "s", spec, (await it.get()).version)
        await it.later(MINUTE)
        assert len(await it.tasks()) == 1


async def test_triggers_of_a_paused_schedule_pile_up_nowhere(tmp_path: Path) -> None:
    """Its history is bounded, and so is what it remembers of the work it started."""
    async with timed(tmp_path) as it:
        it.keeper = ScheduleKeeper(it.here.store, it.here.clock, it.firing)
        await it.create(every=60, task=TASK)
        await it.scheduler.pause(ANNA, "s")
        for place in range(25):
            await it.scheduler.trigger(ANNA, "s", str(place))
        made = await it.get()
        assert len(made.active) == 20
        assert schedules.due(msgspec.structs.replace(made, records=1101), None) == 1
        assert schedules.due(made, made.position + 1) is None


STEP = st.one_of(
    st.tuples(st.just("wait"), st.integers(1, 400)),
    st.tuples(st.just("jump"), st.integers(-7200, 3600)),
    st.tuples(st.just("pause"), st.just(0)),
    st.tuples(st.just("resume"), st.just(0)),
    st.tuples(st.just("edit"), st.integers(30, 90)),
    st.tuples(st.just("trigger"), st.integers(0, 3)),
    st.tuples(st.just("backfill"), st.integers(60, 3000)),
    st.tuples(st.just("stop"), st.just(0)),
    st.tuples(st.just("finish"), st.just(0)),
)


async def _played(folder: Path, overlap: str, catch_up: str, steps: list[tuple[str, int]]) -> None:
    async with timed(folder, history=5) as one:
        two = Timed(one.here, history=5)
        made = await one.create(every=60, overlap=overlap, catch_up=catch_up, catch_up_limit=7, task=TASK)
        clock = one.here.clock
        for what, amount in steps:
            match what:
                case "wait":
                    clock.advance(amount)
                case "jump":
                    clock.set_wall(clock.now() + amount * 1000)
                case "pause":
                    await one.scheduler.pause(ANNA, "s")
                case "resume":
                    await one.scheduler.resume(ANNA, "s")
                case "edit":
                    before = await one.get()
                    spec = msgspec.structs.replace(before.spec, every=float(amount))
                    await one.scheduler.replace(ANNA, "s", spec, before.version)
                case "trigger":
                    await one.scheduler.trigger(ANNA, "s", f"key-{amount}-{clock.now()}")
                case "backfill":
                    now = to_datetime(clock.now())
                    request = BackfillRequest(since=now - timedelta(seconds=amount), to=now, width=3)
                    with suppress(InvalidTransition):
                        await one.scheduler.backfill(ANNA, "s", request)
                case "stop":
                    await one.scheduler.stop_backfill(ANNA, "s")
                case "finish":
                    await one.here.finish([task for task in await one.tasks() if not task.final])
            await asyncio.gather(one.once(), two.once())
            await one.here.settled()
        fired = [stored.fact for stored in one.here.facts if stored.fact.type == "schedule.fired"]
        told = [msgspec.json.decode(fact.data) for fact in fired]
        slots = [one["slot"] for one in told if one["source"] != "manual"]
        assert len(slots) == len(set(slots)), "a slot fired twice"
        assert sorted(one["target"] for one in told) == sorted(task.id for task in await one.tasks())
        assert (await one.get()).fired == len(fired)
        kept = await one.here.store.count("fire", [Where("schedule", "eq", made.id)], 1000)
        assert kept == (await one.get()).records


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["allow", "skip", "queue-one", "cancel-previous"]),
    st.sampled_from(["none", "last", "all"]),
    st.lists(STEP, max_size=25),
)
def test_nothing_that_is_done_to_a_schedule_fires_a_slot_twice(
    overlap: str, catch_up: str, steps: list[tuple[str, int]]
) -> None:
    """Two leaders, clock jumps, pauses, edits, triggers, backfills and a short history, in any order."""
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_played(Path(folder), overlap, catch_up, steps))
