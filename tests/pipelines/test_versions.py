"""Versions: what differs between them, that runs keep theirs, and that what is used cannot be deleted."""

import threading
from collections.abc import AsyncIterator, ItemsView
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.artifacts.service import Artifacts
from mcp_control.kernel.errors import NotFound, PipelineInUse
from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.definition_model import PipelineSpec, Stage
from mcp_control.pipelines.difference import difference
from mcp_control.pipelines.firing import Firing
from mcp_control.pipelines.model import RunRequest, RunState
from mcp_control.pipelines.plan_model import FieldChange
from mcp_control.pipelines.retention import PipelineRetention, RunRetention
from mcp_control.pipelines.schedule_model import ScheduledRun, ScheduleSpec
from mcp_control.pipelines.scheduler import Scheduler
from mcp_control.storage.local.blobs import FolderBlobs
from tests.pipelines.world import ANNA, ORIGIN, World, world

DAY = 86_400_000


@pytest_asyncio.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


def spec(*stages: tuple[str, str], **options: int) -> PipelineSpec:
    p = PipelineBuilder("p", **options)
    for name, uses in stages:
        p.stage(name, uses)
    return p.build()


def test_a_difference_names_stages_and_fields() -> None:
    """Added, removed and changed stages are told by id, each changed field with both values; so is the rest by place."""
    before, after = PipelineBuilder("p", priority=40), PipelineBuilder("p", deadline_seconds=60)
    first = before.stage("a", "one", with_={"x": {"y": 1, "z": 2}})
    before.stage("b", "two", needs=[first])
    before.stage("gone", "three")
    first = after.stage("a", "one", with_={"x": {"y": 5, "w": None}})
    after.stage("new", "four")
    after.stage("b", "two", needs=[first])
    found = difference("p", (1, before.build()), (3, after.build()))
    assert (found.before, found.after, found.same, found.reordered) == (1, 3, False, False)
    assert (found.added, found.removed) == (["new"], ["gone"])
    assert [change.stage for change in found.changed] == ["a"]
    assert found.changed[0].fields == [
        FieldChange(pointer="/with/x/y", before=1, after=5),
        FieldChange(pointer="/with/x/z", before=2),
        FieldChange(pointer="/with/x/w", after=None),
    ]
    assert found.fields == [
        FieldChange(pointer="/spec/priority", before=40),
        FieldChange(pointer="/spec/deadline_seconds", after=60),
    ]


STAGES = st.lists(
    st.builds(
        lambda name, uses, load: Stage(id=name, uses=uses, with_=load),
        st.sampled_from("abcd"),
        st.sampled_from(["x", "y"]),
        st.dictionaries(st.sampled_from("mn"), st.integers(0, 1) | st.lists(st.integers(0, 1), max_size=2)),
    ),
    min_size=1,
    unique_by=lambda stage: stage.id,
)


@given(STAGES, STAGES)
def test_a_difference_is_empty_exactly_for_equal_definitions(one: list[Stage], other: list[Stage]) -> None:
    """Nothing differs if and only if the definitions are equal, and both directions agree on what came and went."""
    made = [
        msgspec.structs.replace(each, spec=msgspec.structs.replace(each.spec, stages=stages))
        for each, stages in ((spec(("a", "t")), one), (spec(("a", "t")), other))
    ]
    forth, back = difference("p", (1, made[0]), (2, made[1])), difference("p", (2, made[1]), (1, made[0]))
    assert forth.same == back.same == (made[0] == made[1])
    assert (sorted(forth.added), sorted(forth.removed)) == (sorted(back.removed), sorted(back.added))


async def test_a_run_keeps_the_version_it_began_with(here: World) -> None:
    """A newer version changes nothing in runs under way; its tasks are those of the old one to the end."""
    p = PipelineBuilder("p")
    p.stage("second", "old.second", needs=[p.stage("first", "old.first")])
    run = await here.start(p.build())
    await here.engine.create(ANNA, spec(("other", "new.work")))
    await here.finish(await here.tasks(run))
    assert [task.type for task in await here.tasks(run)] == ["old.second"]
    await here.finish(await here.tasks(run))
    ended = await here.run(run)
    assert (ended.state, ended.pipeline_number) == (RunState.COMPLETED, 1)
    newer, _ = await here.engine.execute(ANNA, "p", RunRequest(), ORIGIN)
    older, _ = await here.engine.execute(ANNA, "p", RunRequest(version=1), ORIGIN)
    assert (newer.pipeline_number, older.pipeline_number) == (2, 1)


async def test_a_version_in_use_cannot_be_deleted(here: World) -> None:
    """Refused while a run that has not ended began with it; other versions can go; afterwards it can go as well."""
    run = await here.start(spec(("a", "one")))
    await here.engine.create(ANNA, spec(("a", "two")))
    await here.engine.create(ANNA, spec(("a", "three")))
    for version in (1, None):
        with pytest.raises(PipelineInUse) as refused:
            await here.catalogue.delete(ANNA, "p", version)
        assert refused.value.data["runs"] == [run.id]
    await here.catalogue.delete(ANNA, "p", 3)
    assert (await here.engine.get(ANNA, "p")).number == 2, "the newest that is left is the newest"
    assert [each.version for each in (await here.catalogue.versions(ANNA, "p")).items] == [2, 1]
    await here.finish(await here.tasks(run))
    await here.catalogue.delete(ANNA, "p", 1)
    with pytest.raises(NotFound):
        await here.engine.execute(ANNA, "p", RunRequest(version=1), ORIGIN)
    assert (await here.engine.view(ANNA, await here.run(run))).stages[0].uses == "one", "its runs can still be seen"


async def test_numbers_of_deleted_versions_are_not_given_again(here: World) -> None:
    """After the whole pipeline was deleted, a new one of that name goes on counting."""
    for uses in ("one", "two"):
        await here.engine.create(ANNA, spec(("a", uses)))
    gone = await here.engine.get(ANNA, "p")
    await here.catalogue.delete(ANNA, "p")
    for ref in ("p", gone.id):
        with pytest.raises(NotFound):
            await here.engine.get(ANNA, ref)
    assert (await here.engine.list(ANNA)).items == []
    again, created = await here.engine.create(ANNA, spec(("a", "two")))
    assert (again.number, created) == (3, True)
    told = [stored.fact.type for stored in here.facts if stored.fact.type.startswith("pipeline.")]
    assert told == ["pipeline.created"] * 2 + ["pipeline.deleted"] * 2 + ["pipeline.created"]


async def test_a_schedule_keeps_what_it_starts_from_being_deleted(here: World) -> None:
    """One that names a version keeps that version; one of the newest keeps the last that is left."""
    for uses in ("one", "two", "three"):
        await here.engine.create(ANNA, spec(("a", uses)))
    pinned = ScheduleSpec(name="pinned", every=3600, run=ScheduledRun(pipeline="p", version=1))
    newest = ScheduleSpec(name="newest", every=3600, run=ScheduledRun(pipeline="p"))
    scheduler = Scheduler(here.store, here.clock, here.ids, Firing(here.store, here.clock, here.engine, here.settler))
    await scheduler.create(ANNA, pinned)
    await scheduler.create(ANNA, newest)
    with pytest.raises(PipelineInUse) as refused:
        await here.catalogue.delete(ANNA, "p", 1)
    assert refused.value.data["schedules"] == ["pinned"]
    await here.catalogue.delete(ANNA, "p", 3)
    await here.catalogue.delete(ANNA, "p", 2)
    await scheduler.delete(ANNA, "pinned")
    with pytest.raises(PipelineInUse) as refused:
        await here.catalogue.delete(ANNA, "p", 1)
    assert refused.value.data["schedules"] == ["newest"]


@pytest.mark.parametrize("no_cache", [False, True])
async def test_a_schedule_says_whether_its_runs_take_earlier_results(here: World, no_cache: bool) -> None:
    """`no_cache` of a schedule is that of the runs it starts."""
    await here.engine.create(ANNA, spec(("a", "one")))
    scheduler = Scheduler(here.store, here.clock, here.ids, Firing(here.store, here.clock, here.engine, here.settler))
    await scheduler.create(
        ANNA, ScheduleSpec(name="anew", every=3600, run=ScheduledRun(pipeline="p", no_cache=no_cache))
    )
    fire = await scheduler.trigger(ANNA, "anew", "by-hand")
    assert fire.target is not None
    assert (await here.engine.run(ANNA, fire.target)).no_cache is no_cache


async def test_a_deleted_definition_is_removed_after_its_last_run(here: World, tmp_path: Path) -> None:
    """It stays while a run that began with it is kept, and is gone when that is."""
    run = await here.start(spec(("a", "one")))
    await here.finish(await here.tasks(run))
    await here.catalogue.delete(ANNA, "p")
    pipelines = PipelineRetention(here.store, 30 * DAY)
    assert await pipelines.once(here.clock.now() + 29 * DAY) == 0
    assert await pipelines.once(here.clock.now() + 31 * DAY) == 0, "its run is still there"
    artifacts = Artifacts(here.store, FolderBlobs(tmp_path / "blobs"), here.clock, here.ids, max_bytes=1)
    assert await RunRetention(here.store, artifacts, 30 * DAY).once(here.clock.now() + 31 * DAY) == 1
    assert await pipelines.once(here.clock.now() + 31 * DAY) == 1
    assert (await here.store.get("pipeline", [run.pipeline_id]))[0] is None


class Watched(dict[str, object]):
    """A payload that notes the threads in which somebody looks through it."""

    threads: ClassVar[set[int]] = set()

    def items(self) -> ItemsView[str, object]:  # type: ignore[override]  # the narrower return type is not in builtins
        self.threads.add(threading.get_ident())
        return super().items()


async def test_large_definitions_do_not_stop_the_event_loop(here: World) -> None:
    """Checking and compiling a thousand stages happens in another thread, and the run begins with all that can begin."""
    p = PipelineBuilder("big")
    for number in range(1000):
        p.stage(f"s{number}", "work", needs=[f"s{number - 20}"] if number >= 20 else [])
    built = p.build()
    stages = [msgspec.structs.replace(stage, with_=Watched(x=1)) for stage in built.spec.stages]
    Watched.threads.clear()
    run = await here.start(msgspec.structs.replace(built, spec=msgspec.structs.replace(built.spec, stages=stages)))
    assert Watched.threads, "somebody looked at the payloads"
    assert threading.get_ident() not in Watched.threads
    assert len(await here.tasks(run)) == 20
