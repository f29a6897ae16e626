"""Repeating a run with other parameters: what is kept fits what is new, or it is refused."""

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from mcp_control.kernel.errors import Invalid
from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.pipelines.model import RunState
from tests.pipelines.world import ANNA, World, world


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


def two_stages() -> PipelineSpec:
    p = PipelineBuilder("two")
    size, shape = p.param("size", "integer", default=1), p.param("shape", default="round")
    p.param("unread", default="")
    first = p.stage("first", "work", with_={"size": size})
    each = p.stage("each", "work", needs=[first], fan_out="[1, 2]", with_={"shape": shape, "item": "${{ item }}"})
    p.stage("last", "work", needs=[each], with_={"all": each.output})
    return p.build()


def raw(**values: object) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in values.items()}


async def test_a_retry_with_another_parameter_keeps_what_did_not_read_it(here: World) -> None:
    """The first stage stays; the fan-out that read the parameter starts over in whole; who, why and what is recorded."""
    run = await here.start(two_stages())
    await here.finish(await here.tasks(run), {"n": 1})
    one, two = await here.tasks(run)
    await here.finish([one], "old")
    await here.fail([two])
    again = await here.engine.retry(ANNA, run.id, params=raw(shape="square", size=1), reason="round does not fit")
    assert [stage.state.value for stage in again.stages] == ["completed", "running", "pending"]
    tasks = await here.tasks(run)
    assert [await here.payload(task) for task in tasks] == [
        {"shape": "square", "item": 1},
        {"shape": "square", "item": 2},
    ]
    here.restart()
    view = await here.engine.view(ANNA, await here.run(run))
    assert view.params is not None
    assert msgspec.json.decode(view.params["shape"]) == "square"
    (told,) = view.retries
    assert (told.by, told.reason, told.params, told.round) == (ANNA.id, "round does not fit", ["shape"], 1)
    await here.finish(tasks, "new")
    (last,) = await here.tasks(run)
    assert await here.payload(last) == {"all": ["new", "new"]}
    await here.finish([last])
    assert (await here.run(run)).state is RunState.COMPLETED
    (fact,) = [one.fact for one in here.facts if one.fact.type == "run.retried"]
    assert msgspec.json.decode(fact.data)["params"] == ["shape"]


@pytest.mark.parametrize(
    ("stage", "params", "code"),
    [
        (None, {"size": 2}, "stale-result"),
        ("each", {"size": 2}, "stale-result"),
        (None, {"unread": "x"}, "no-effect"),
        (None, {"size": "large"}, "wrong-type"),
        (None, {"colour": "red"}, "unknown-field"),
        ("nowhere", {}, "unknown-reference"),
    ],
)
async def test_a_retry_that_makes_no_sense_is_refused(
    here: World, stage: str | None, params: dict[str, object], code: str
) -> None:
    """Results made with the old value are not mixed with the new one, and nothing is changed by a refusal."""
    run = await here.start(two_stages())
    await here.finish(await here.tasks(run), {"n": 1})
    await here.fail(await here.tasks(run))
    before = await here.run(run)
    with pytest.raises(Invalid) as refused:
        await here.engine.retry(ANNA, run.id, stage, raw(**params))
    assert [error.code for error in refused.value.errors] == [code]
    assert await here.run(run) == before


async def test_a_retry_from_the_stage_that_read_it_takes_the_new_value(here: World) -> None:
    """What is run anew from the reading stage on may have any value."""
    run = await here.start(two_stages())
    await here.finish(await here.tasks(run), {"n": 1})
    await here.fail(await here.tasks(run))
    await here.engine.retry(ANNA, run.id, "first", raw(size=2))
    (task,) = await here.tasks(run)
    assert await here.payload(task) == {"size": 2}
