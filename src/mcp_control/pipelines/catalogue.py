"""The catalogue of definitions: each accepted change is a new version, and versions never change."""

import builtins
from collections.abc import Callable, Collection, Sequence
from functools import partial
from hashlib import sha256
from typing import Final

from msgspec.structs import replace

from mcp_control.events.log import fact
from mcp_control.kernel.changes import Change, Entity, IndexValue, Query, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict, InvalidPipeline, NotFound, Problem
from mcp_control.kernel.ids import IdSource, is_id
from mcp_control.kernel.paging import Page, decode_cursor, encode_cursor
from mcp_control.pipelines.definition import to_json
from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.pipelines.difference import difference
from mcp_control.pipelines.inclusion import faults
from mcp_control.pipelines.model import Pipeline
from mcp_control.pipelines.plan import off_loop
from mcp_control.pipelines.plan_model import Difference
from mcp_control.pipelines.records import pipeline_view, read_pipeline, scoped, write_pipeline
from mcp_control.pipelines.usage import refuse_in_use
from mcp_control.pipelines.validate import ERRORS_MAX, validate
from mcp_control.pipelines.view_model import PipelineView
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Store

_TRIES: Final = 10
_BATCH: Final = 200
_KNOWN_MAX: Final = 32


class Catalogue:
    """Keeps definitions.

    Args:
        offered: names of the capabilities that registered agents of a tenant have, for warnings; None leaves that out.
        shared: other servers write definitions too.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        ids: IdSource,
        offered: Callable[[str], Collection[str]] | None = None,
        shared: bool = False,
    ) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self._offered = offered
        self._known: dict[str, Pipeline] = {}  # the most lately used last
        self._shared = shared
        self._newest: dict[tuple[str, str], Pipeline] = {}  # by tenant and name; only where nobody else writes
        self._written = 0

    async def check(self, actor: Actor, spec: PipelineSpec) -> builtins.list[str]:
        """Return warnings about a definition. Raises InvalidPipeline when it could not be accepted."""
        allow(actor, "pipelines.create")
        offered = None if self._offered is None else self._offered(actor.tenant)
        wrong = await faults(spec, partial(self._included, actor.tenant))
        try:
            warnings = await off_loop(spec, validate, spec, offered)
        except InvalidPipeline as problem:
            problem.errors = tuple([*problem.errors, *wrong][:ERRORS_MAX])
            raise
        if wrong:
            raise InvalidPipeline(wrong[0].detail, errors=wrong[:ERRORS_MAX])
        return warnings

    async def _included(self, tenant: str, name: str, version: int | None) -> PipelineSpec | None:
        if version is None:
            found = await self._latest(tenant, name)
        else:
            where = [Where("name_number", "eq", scoped(tenant, name, version))]
            rows = await self._store.find("pipeline", Query(where=where, limit=1))
            found = self._read(rows[0]) if rows else None
        return None if found is None or found.deleted_at is not None else found.spec

    async def create(self, actor: Actor, spec: PipelineSpec) -> tuple[Pipeline, bool]:
        """Accept a definition as the newest version of its name, and say whether it is new: one equal to the newest is that one.

        Raises:
            InvalidPipeline: with all that is wrong.
            Conflict: too many at once.
        """
        await self.check(actor, spec)
        digest = sha256(await off_loop(spec, to_json, spec)).hexdigest()
        for _ in range(_TRIES):
            now = self._clock.now()
            latest = await self._latest(actor.tenant, spec.metadata.name)
            if latest is not None and latest.digest == digest:
                return latest, False
            pipeline = Pipeline(
                id=self._ids.new("pipe"),
                version=1,
                tenant=actor.tenant,
                name=spec.metadata.name,
                number=1 + await self._newest_number(actor.tenant, spec.metadata.name),
                spec=spec,
                digest=digest,
                created_at=now,
                created_by=actor.id,
            )
            # The unique number makes one of two writers at once try again.
            old = [] if latest is None else [write_pipeline(replace(latest, version=latest.version + 1), latest=False)]
            data = {"name": pipeline.name, "version": pipeline.number}
            created = fact("pipeline.created", pipeline.id, actor.id, now, data, tenant=actor.tenant)
            outcome = await self._commit(Change([*old, write_pipeline(pipeline, latest=True)], (), [created]))
            if outcome is None:
                return pipeline, True
            if not isinstance(outcome, Conflict):
                raise outcome
        raise Conflict("too many changes to this pipeline at once")

    async def get(self, actor: Actor, ref: str, version: int | None = None) -> Pipeline:
        """Return a definition by id or name, with `version` that version of its name, else the newest. Raises NotFound."""
        allow(actor, "pipelines.get", ref)
        found: Pipeline | None = None
        name: str | None = ref
        if ref.startswith("pipe_") and is_id(ref):
            entity = (await self._store.get("pipeline", [ref]))[0]
            found = None if entity is None else self._read(entity)
            name = None if found is None or found.tenant != actor.tenant else found.name
        if name is not None and version is not None:
            where = [Where("name_number", "eq", scoped(actor.tenant, name, version))]
            rows = await self._store.find("pipeline", Query(where=where, limit=1))
            found = self._read(rows[0]) if rows else None
        elif name is not None and found is None:
            found = await self._latest(actor.tenant, name)
        if found is None or found.tenant != actor.tenant or found.deleted_at is not None:
            raise NotFound("no such pipeline")
        return found

    async def list(self, actor: Actor, *, cursor: str | None = None, limit: int = 50) -> Page[PipelineView]:
        """Return a page of the newest versions, by name."""
        allow(actor, "pipelines.list")
        after = None if cursor is None else decode_cursor("pipelines", cursor, 2)
        where = [Where("latest", "ge", scoped(actor.tenant, "")), Where("latest", "lt", actor.tenant + "\x20")]
        rows = await self._store.find("pipeline", Query(where=where, order="latest", after=after, limit=limit + 1))
        more = len(rows) > limit
        last = rows[limit - 1] if more else None
        items = [pipeline_view(read_pipeline(row), with_spec=False) for row in rows[:limit]]
        return Page(
            items=items,
            next_cursor=None if last is None else encode_cursor("pipelines", [last.index["latest"], last.id]),
        )

    async def versions(
        self, actor: Actor, ref: str, *, cursor: str | None = None, limit: int = 50
    ) -> Page[PipelineView]:
        """Return a page of the versions of a pipeline, the newest first. Raises NotFound."""
        name = (await self.get(actor, ref)).name
        after = None if cursor is None else decode_cursor("versions", cursor, 2)
        where = [Where("name", "eq", scoped(actor.tenant, name))]
        rows = await self._store.find(
            "pipeline", Query(where=where, order="number", descending=True, after=after, limit=limit + 1)
        )
        found = [read_pipeline(row) for row in rows[:limit]]
        return Page(
            items=[pipeline_view(each, with_spec=False) for each in found if each.deleted_at is None],
            next_cursor=encode_cursor("versions", [rows[limit - 1].index["number"], rows[limit - 1].id])
            if len(rows) > limit
            else None,
        )

    async def diff(self, actor: Actor, ref: str, before: int | None = None, after: int | None = None) -> Difference:
        """Return what differs between two versions: `after`, by default the newest, and `before`, by default the one before it.

        Raises:
            NotFound: no such pipeline or version, or none before it.
        """
        new = await self.get(actor, ref, after)
        if before is None:
            earlier = [each.number for each in await self._there(actor.tenant, new.name) if each.number < new.number]
            if not earlier:
                raise NotFound("there is no version before this one")
            before = max(earlier)
        old = await self.get(actor, new.name, before)
        return difference(new.name, (old.number, old.spec), (new.number, new.spec))

    async def delete(self, actor: Actor, ref: str, version: int | None = None) -> None:
        """Delete a version (by number, or by its own id), or the pipeline of a name with all versions.

        Runs that ended keep the version they began with: it is hidden at once, and removed when the last of them is.

        Raises:
            NotFound: no such pipeline or version.
            PipelineInUse: a run that has not ended, or a schedule, uses it; nothing was deleted.
            Conflict: too many changes at once.
        """
        allow(actor, "pipelines.delete", ref)
        for _ in range(_TRIES):
            chosen = await self.get(actor, ref, version)
            there = await self._there(actor.tenant, chosen.name)
            only = version is not None or ref == chosen.id
            going = [each for each in there if each.id == chosen.id or not only]
            left = [each for each in there if each not in going]
            await refuse_in_use(self._store, actor.tenant, going, left)
            if await self._hide(actor, going, left):
                return
        raise Conflict("too many changes to this pipeline at once")

    async def _hide(self, actor: Actor, going: Sequence[Pipeline], left: Sequence[Pipeline]) -> bool:
        now = self._clock.now()
        writes = [
            write_pipeline(replace(each, version=each.version + 1, deleted_at=now), latest=False) for each in going
        ]
        if left:
            newest = max(left, key=lambda each: each.number)
            writes.append(write_pipeline(replace(newest, version=newest.version + 1), latest=True))
        facts = [
            fact(
                "pipeline.deleted",
                each.id,
                actor.id,
                now,
                {"name": each.name, "version": each.number},
                tenant=each.tenant,
            )
            for each in going
        ]
        problem = await self._commit(Change(writes, (), facts))
        if problem is not None and not isinstance(problem, Conflict):
            raise problem
        return problem is None

    async def _there(self, tenant: str, name: str) -> builtins.list[Pipeline]:
        """Return all versions of a name that are not deleted."""
        found: builtins.list[Pipeline] = []
        after: builtins.list[IndexValue] | None = None
        while True:
            where = [Where("name", "eq", scoped(tenant, name))]
            rows = await self._store.find("pipeline", Query(where=where, order="number", after=after, limit=_BATCH))
            found += [each for row in rows if (each := read_pipeline(row)).deleted_at is None]
            if len(rows) < _BATCH:
                return found
            after = [rows[-1].index["number"], rows[-1].id]

    async def _newest_number(self, tenant: str, name: str) -> int:
        """Return the number of the newest version there was, deleted ones included: a number is not given twice; 0 for none."""
        where = [Where("name", "eq", scoped(tenant, name))]
        rows = await self._store.find("pipeline", Query(where=where, order="number", descending=True, limit=1))
        return max((read_pipeline(row).number for row in rows), default=0)

    async def _commit(self, change: Change) -> Problem | None:
        try:
            return (await self._store.commit([change]))[0]
        finally:
            self._written += 1
            self._newest.clear()

    async def _latest(self, tenant: str, name: str) -> Pipeline | None:
        known = self._newest.get((tenant, name))
        if known is not None:
            return known
        written = self._written
        rows = await self._store.find("pipeline", Query(where=[Where("latest", "eq", scoped(tenant, name))], limit=1))
        found = self._read(rows[0]) if rows else None
        if found is not None and not self._shared and written == self._written:  # else it may have been overtaken
            self._newest[tenant, name] = found
            if len(self._newest) > _KNOWN_MAX:
                del self._newest[next(iter(self._newest))]
        return found

    def _read(self, entity: Entity) -> Pipeline:
        """Return the definition in an entity, from memory where it is known at this version: decoding a large one takes long."""
        known = self._known.pop(entity.id, None)
        if known is None or known.version != entity.version:
            known = read_pipeline(entity)
        self._known[entity.id] = known
        if len(self._known) > _KNOWN_MAX:
            del self._known[next(iter(self._known))]
        return known
