"""Bundles: one finished run as a file, to be looked at or run again on another server.

A bundle is the file of a backup with the entities of one run: the run, its version of the pipeline, its tasks with payloads, results and
logs, its artifacts and those its parameters name, and the events of the run, numbered anew. It holds no tokens.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.archive.backup import BlobPiece, EntityPage, Parts, read
from mcp_control.archive.backup import Part as BackupPart
from mcp_control.archive.container import written
from mcp_control.archive.incoming import IDS, Incoming, Survey, damaged, survey
from mcp_control.archive.model import BUNDLE, Header
from mcp_control.artifacts.model import ARTIFACT_KIND, Artifact
from mcp_control.artifacts.service import Artifacts
from mcp_control.artifacts.service import read as read_artifact
from mcp_control.kernel.changes import Change, Entity, Key, Query, StoredFact, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict, NotFound, OutcomeUnknown, Problem
from mcp_control.kernel.ids import IdSource
from mcp_control.pipelines.counting import task_id
from mcp_control.pipelines.model import PIPELINE_KIND, RUN_KIND, Pipeline, Run, RunRequest
from mcp_control.pipelines.records import run_fact
from mcp_control.pipelines.service import PipelineEngine
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Store
from mcp_control.tasks.model import LOG_KIND, TASK_KIND, Lease, Origin, Task
from mcp_control.tasks.records import read as read_task
from mcp_control.tasks.records import write as write_task

_PAGE: Final = 500
_FACTS: Final = 10_000


class Bundles:
    """Writes and reads bundles on a server."""

    def __init__(
        self, store: Store, artifacts: Artifacts, engine: PipelineEngine, clock: Clock, ids: IdSource, product: str
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._engine = engine
        self._clock = clock
        self._ids = ids
        self._product = product

    # --- out --------------------------------------------------------------------------------------------------------

    async def export(self, actor: Actor, run_id: str, path: Path) -> None:
        """Write the bundle of a run that has ended.

        Raises:
            NotFound: there is no such run.
            Conflict: it has not ended, or a task of it has not.
        """
        allow(actor, "runs.export", run_id)
        run = await self._engine.run(actor, run_id)
        if not run.final:
            raise Conflict("the run has not ended; wait for it, or cancel it", state=run.state.value)
        (stored,) = await self._store.get(RUN_KIND.name, [run_id], RUN_KIND.cold)
        (pipeline,) = await self._store.get(PIPELINE_KIND.name, [run.pipeline_id])
        if stored is None or pipeline is None:
            raise NotFound("no such run")
        kinds = sorted((RUN_KIND, PIPELINE_KIND, TASK_KIND, LOG_KIND, ARTIFACT_KIND), key=lambda kind: kind.name)
        header = Header(
            product=self._product, store=BUNDLE, run=run_id, created_at=self._clock.now(), newest_seq=0, kinds=kinds
        )
        with written(path) as file:
            parts = Parts(file, header)
            parts.entities(RUN_KIND.name, [stored])
            parts.entities(PIPELINE_KIND.name, [pipeline])
            await self._export_tasks(parts, run_id)
            artifacts = await self._export_artifacts(parts, actor, run_id, stored.cold.get("params", b""))
            await self._export_facts(parts, run_id)
            for digest, artifact_id in sorted(artifacts.items()):
                _, chunks = await self._artifacts.content(actor, artifact_id)
                await parts.blob(digest, chunks)
            await asyncio.to_thread(parts.seal)

    async def _export_tasks(self, parts: Parts, run_id: str) -> None:
        where = [Where("run", "eq", run_id)]
        after: list[str] | None = None
        while True:
            # Payloads and results may have a mebibyte each.
            page = await self._store.find(
                TASK_KIND.name, Query(where=where, after=after, limit=50, cold=("payload", "result"))
            )
            tasks = [read_task(entity) for entity in page]
            if any(not task.final for task in tasks):
                raise Conflict("a task of the run is still being stopped; try again in a moment", retry_after=1.0)
            if page:
                entities = [_without_token(entity, task) for entity, task in zip(page, tasks, strict=True)]
                await asyncio.to_thread(parts.entities, TASK_KIND.name, entities)
            for task in tasks:
                if task.log_lines:
                    await self._export_log(parts, task.id)
            if len(page) < 50:
                return
            after = [page[-1].id]

    async def _export_log(self, parts: Parts, task: str) -> None:
        after: list[str | int | None] | None = None
        where = [Where("task", "eq", task)]
        while True:
            page = await self._store.find(LOG_KIND.name, Query(where=where, order="first", after=after, limit=_PAGE))
            if page:
                await asyncio.to_thread(parts.entities, LOG_KIND.name, page)
            if len(page) < _PAGE:
                return
            after = [page[-1].index["first"], page[-1].id]

    async def _export_artifacts(self, parts: Parts, actor: Actor, run_id: str, params: bytes) -> dict[str, str]:
        """Write the artifacts of the run and those its parameters name; returns one artifact for each digest."""
        found: dict[str, Entity] = {}
        after: list[str] | None = None
        while True:
            page = await self._store.find(
                ARTIFACT_KIND.name, Query(where=[Where("run", "eq", run_id)], after=after, limit=_PAGE)
            )
            found |= {entity.id: entity for entity in page}
            if len(page) < _PAGE:
                break
            after = [page[-1].id]
        named = sorted({one.decode() for one in IDS.findall(params) if one.startswith(b"art_")} - found.keys())
        for entity in await self._store.get(ARTIFACT_KIND.name, named):
            if entity is not None and entity.index["tenant"] == actor.tenant:
                found[entity.id] = entity
        entities = list(found.values())
        for start in range(0, len(entities), _PAGE):
            await asyncio.to_thread(parts.entities, ARTIFACT_KIND.name, entities[start : start + _PAGE])
        return {str(entity.index["sha256"]): entity.id for entity in entities}

    async def _export_facts(self, parts: Parts, run_id: str) -> None:
        after = written_until = 0
        while page := await self._store.facts(after, _FACTS):
            after = page[-1].seq
            ours = [stored.fact for stored in page if stored.fact.run == run_id]
            if ours:
                numbered = [StoredFact(seq, one) for seq, one in enumerate(ours, written_until + 1)]
                await asyncio.to_thread(parts.facts, numbered)
                written_until += len(numbered)

    # --- in ---------------------------------------------------------------------------------------------------------

    async def take_in(self, actor: Actor, path: Path) -> Run:
        """Add the run of a bundle, as it ended elsewhere. Ids that are taken here are replaced, wherever they occur.

        The run comes last, so nobody sees half of it; what was written before a failure is removed.

        Raises:
            Invalid: `bundle-damaged`: nothing was changed.
            InvalidPipeline: this server would not accept its pipeline.
        """
        allow(actor, "runs.import")
        found = await asyncio.to_thread(survey, path)
        ids = await self._ids_for(found)
        pipeline = await self._pipeline(actor, found.pipeline)
        incoming = Incoming(actor, ids, self._clock.now(), pipeline, self._ids)
        made = _Made()
        try:
            return await self._write(actor, path, incoming, made)
        except OutcomeUnknown:  # the run may be there, so what belongs to it stays
            raise
        except BaseException:
            with suppress(Problem):  # the reason of the failure is what the caller must hear
                await asyncio.shield(self._remove(actor, made))
            raise

    async def replay(self, actor: Actor, run: Run, origin: Origin) -> Run:
        """Start a run of the same version of the pipeline with the same parameters and input artifacts."""
        (stored,) = await self._store.get(RUN_KIND.name, [run.id], ("params",))
        params = {} if stored is None else msgspec.json.decode(stored.cold["params"], type=dict[str, msgspec.Raw])
        request = RunRequest(params=params, version=run.pipeline_number, labels=run.labels, priority=run.priority)
        return (await self._engine.execute(actor, run.pipeline, request, origin))[0]

    async def _ids_for(self, survey: Survey) -> dict[bytes, bytes]:
        """Return new ids for those that are taken; an input artifact that is here already stays as it is."""
        taken = await self._taken(RUN_KIND.name, [survey.run.id])
        mapped: dict[str, str] = {one: self._ids.new("run") for one in taken}
        run_id = mapped.get(survey.run.id, survey.run.id)
        for one in await self._taken(TASK_KIND.name, list(survey.tasks)):
            mapped[one] = self._ids.new("task")
        for one, derived in survey.tasks.items():
            if derived is not None and run_id != survey.run.id:
                mapped[one] = task_id(run_id, *derived)
        for one in await self._taken(ARTIFACT_KIND.name, list(survey.artifacts)):
            here = (await self._store.get(ARTIFACT_KIND.name, [one]))[0]
            theirs = survey.artifacts[one]
            if here is None or theirs.run_id == survey.run.id or read_artifact(here).sha256 != theirs.sha256:
                mapped[one] = self._ids.new("art")
        return {old.encode(): new.encode() for old, new in mapped.items()}

    async def _taken(self, kind: str, ids: Sequence[str]) -> list[str]:
        found: list[str] = []
        for start in range(0, len(ids), _PAGE):
            some = ids[start : start + _PAGE]
            found += [
                one for one, entity in zip(some, await self._store.get(kind, some), strict=True) if entity is not None
            ]
        return found

    async def _pipeline(self, actor: Actor, theirs: Pipeline) -> Pipeline:
        """Return our version of the run's pipeline; made where there is none equal to it."""
        for version in (theirs.number, None):
            try:
                ours = await self._engine.get(actor, theirs.name, version)
            except NotFound:
                continue
            if ours.digest == theirs.digest:
                return ours
        return (await self._engine.create(actor, theirs.spec))[0]

    async def _remove(self, actor: Actor, made: "_Made") -> None:
        for start in range(0, len(made.entities), _PAGE):
            await self._store.commit([Change(deletes=made.entities[start : start + _PAGE])])
        for artifact in made.artifacts:
            await self._artifacts.delete(actor, artifact)

    async def _write(self, actor: Actor, path: Path, incoming: Incoming, made: "_Made") -> Run:
        run: tuple[Run, Entity] | None = None
        artifacts: dict[str, list[Artifact]] = {}
        parts = read(path)
        while (part := await asyncio.to_thread(next, parts, None)) is not None:
            match part:
                case EntityPage("run", [entity]):
                    run = incoming.run(entity)
                case EntityPage("artifact", entities):
                    there = await self._taken(ARTIFACT_KIND.name, [incoming.id(entity.id) for entity in entities])
                    for artifact in map(incoming.artifact, entities):
                        if artifact.id not in there:
                            artifacts.setdefault(artifact.sha256, []).append(artifact)
                case EntityPage("task" | "log", entities):
                    await self._commit([incoming.entity(entity) for entity in entities], made)
                case BlobPiece(digest):
                    chunks = _chunks(part, parts)
                    if wanted := artifacts.pop(digest, None):
                        await self._artifacts.adopt(actor, wanted, chunks)
                        made.artifacts += [artifact.id for artifact in wanted]
                    else:  # artifacts that are here already
                        async for _ in chunks:
                            pass
                case _:
                    pass
        if run is None:
            raise damaged("it holds no run")
        now = self._clock.now()
        (problem,) = await self._store.commit([Change([run[1]], (), [run_fact("run.imported", run[0], actor.id, now)])])
        if problem is not None:
            raise problem
        return run[0]

    async def _commit(self, entities: Sequence[Entity], made: "_Made") -> None:
        """Write tasks or log lines, whose run is not there yet."""
        (problem,) = await self._store.commit([Change(entities)])
        if problem is not None:
            raise problem
        made.entities += [Key(entity.kind, entity.id) for entity in entities]


class _Made(msgspec.Struct):
    """What a bundle has brought so far: tasks and log lines, and artifacts by id."""

    entities: list[Key] = []
    artifacts: list[str] = []


def _without_token(entity: Entity, task: Task) -> Entity:
    lease = task.last_lease
    if lease is None:
        return entity
    bare = Lease(agent_id=lease.agent_id, instance_id=lease.instance_id, token="", since=lease.since)
    _, bare_entity = write_task(replace(task, last_lease=bare, version=task.version - 1))
    return replace(bare_entity, version=entity.version, cold=entity.cold)


async def _chunks(first: BlobPiece, rest: Iterator[BackupPart]) -> AsyncIterator[bytes]:
    piece = first
    yield piece.data
    while not piece.last:
        following = await asyncio.to_thread(next, rest)
        assert isinstance(following, BlobPiece)  # the bundle was checked
        piece = following
        yield piece.data
