"""What is in a bundle, and what becomes of it on this server. Blocking or pure."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.archive.backup import EntityPage, read
from mcp_control.archive.model import BUNDLE, BackupDamaged, Header
from mcp_control.artifacts.model import Artifact
from mcp_control.artifacts.service import read as read_artifact
from mcp_control.kernel.changes import Entity
from mcp_control.kernel.errors import FieldError, Invalid
from mcp_control.kernel.ids import IdSource
from mcp_control.pipelines.counting import task_id
from mcp_control.pipelines.model import Pipeline, Run
from mcp_control.pipelines.records import read_pipeline, read_run, write_run
from mcp_control.security.model import Actor
from mcp_control.tasks.model import LOG_KIND
from mcp_control.tasks.records import read as read_task
from mcp_control.tasks.records import write as write_task

IDS: Final = re.compile(rb"(?:run|task|art)_[0-9a-v]{36}")
_MOST: Final = 200_000  # tasks and artifacts of one bundle


class Survey(msgspec.Struct):
    """What is in a bundle: `tasks` with what their ids were derived from, where they were."""

    run: Run
    pipeline: Pipeline
    tasks: dict[str, tuple[str, int | None, int] | None]
    artifacts: dict[str, Artifact]


def survey(path: Path) -> Survey:
    """Read a bundle whole and check it. Blocks. Raises Invalid."""
    run: Run | None = None
    pipeline: Pipeline | None = None
    tasks: dict[str, tuple[str, int | None, int] | None] = {}
    artifacts: dict[str, Artifact] = {}
    try:
        for part in read(path):
            if isinstance(part, Header) and part.store != BUNDLE:
                raise damaged("it is a backup of a whole store; `mcpctl backup restore` reads it")
            if not isinstance(part, EntityPage):
                continue
            for entity in part.entities:
                match part.kind:
                    case "run":
                        run = read_run(entity)
                    case "pipeline":
                        pipeline = read_pipeline(entity)
                    case "artifact":
                        artifacts[entity.id] = read_artifact(entity)
                    case "task":
                        task = read_task(entity)
                        if not task.final:
                            raise damaged("a task in it has not ended")
                        links = task.links
                        origin = (links.stage or "", links.item, links.round)
                        derived = links.run_id is not None and task_id(links.run_id, *origin) == task.id
                        tasks[task.id] = origin if derived else None
            if len(tasks) + len(artifacts) > _MOST:
                raise damaged(f"it holds more than {_MOST} tasks and artifacts")
    except BackupDamaged as error:
        raise damaged(str(error)) from None
    except msgspec.MsgspecError:
        raise damaged("another version of the product wrote it, or it is not what was written") from None
    if run is None or pipeline is None or not run.final or run.pipeline_id != pipeline.id:
        raise damaged("it does not hold a run that has ended, with its pipeline")
    return Survey(run, pipeline, tasks, artifacts)


class Incoming:
    """What the entities of a bundle are on this server."""

    def __init__(
        self, actor: Actor, ids: Mapping[bytes, bytes], now: int, pipeline: Pipeline, source: IdSource
    ) -> None:
        self._tenant = actor.tenant
        self._map = ids
        self._now = now
        self._pipeline = pipeline
        self._ids = source

    def id(self, one: str) -> str:
        """Return the id that something has here."""
        return self._map.get(one.encode(), one.encode()).decode()

    def _here(self, data: bytes) -> bytes:
        """Replace ids. The new ones have the length of the old, so encoded text stays well-formed."""
        return IDS.sub(lambda found: self._map.get(found[0], found[0]), data) if self._map else data

    def _cold(self, entity: Entity) -> dict[str, bytes]:
        return {name: self._here(data) for name, data in entity.cold.items()}

    def run(self, entity: Entity) -> tuple[Run, Entity]:
        """Return the run as it is here; its retention counts from now."""
        run = read_run(replace(entity, hot=self._here(entity.hot)))
        run = replace(
            run,
            version=1,
            tenant=self._tenant,
            pipeline_id=self._pipeline.id,
            pipeline_number=self._pipeline.number,
            idempotency_key=None,
        )
        written_run = write_run(run, self._cold(entity))
        return run, replace(written_run, index={**written_run.index, "finished": self._now})

    def artifact(self, entity: Entity) -> Artifact:
        """Return an artifact as it is here."""
        artifact = read_artifact(replace(entity, hot=self._here(entity.hot)))
        return replace(artifact, version=1, tenant=self._tenant)

    def entity(self, entity: Entity) -> Entity:
        """Return a task or lines of a log as they are here."""
        if entity.kind == LOG_KIND.name:
            task = self.id(str(entity.index["task"]))
            first = entity.index["first"]
            return Entity(LOG_KIND.name, f"{task}-{first}", 0, {"task": task, "first": first}, entity.hot)
        theirs = read_task(replace(entity, hot=self._here(entity.hot)))
        last = None if theirs.last_lease is None else replace(theirs.last_lease, token=self._ids.secret())
        ours = replace(theirs, version=0, tenant=self._tenant, idempotency_key=None, last_lease=last)
        _, written_task = write_task(ours)
        index = {**written_task.index, "finished": self._now}
        return replace(written_task, index=index, cold=self._cold(entity))


def damaged(why: str) -> Invalid:
    return Invalid(
        f"this bundle cannot be taken in: {why}",
        errors=[FieldError(pointer="#", code="bundle-damaged", detail=why)],
    )
