"""PipelineEngine: the verbs for pipelines and runs that every door calls, and the follower that moves runs on."""

import builtins
from collections.abc import Callable, Coroutine, Mapping, Sequence
from hashlib import sha256
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.kernel.changes import Fact, Query, StoredFact, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict, Duplicate, IdempotencyMismatch, Invalid, NotFound
from mcp_control.kernel.ids import IdSource
from mcp_control.kernel.paging import Page
from mcp_control.kernel.text import text_errors
from mcp_control.pipelines import control
from mcp_control.pipelines.catalogue import Catalogue
from mcp_control.pipelines.counting import waited_for
from mcp_control.pipelines.decision import Material
from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.pipelines.listing import page
from mcp_control.pipelines.model import Parent, Pipeline, Run, RunRequest, RunState
from mcp_control.pipelines.params import resolve
from mcp_control.pipelines.plan import Plan, off_loop
from mcp_control.pipelines.records import pipeline_view, read_run, run_fact, run_view, scoped
from mcp_control.pipelines.results import StageResults
from mcp_control.pipelines.runs import Active, Free, Plans, Runs
from mcp_control.pipelines.starting import Along, budget_of, budget_writes, check_request, new_run
from mcp_control.pipelines.view_model import PipelineView, RunView
from mcp_control.pipelines.waiters import Waiters
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Store
from mcp_control.tasks.followers import Advance, Finished
from mcp_control.tasks.model import Origin, Request, TaskState
from mcp_control.tasks.records import read as read_task
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.submission import check_key

_TRIES: Final = 10
WAIT_MAX_SECONDS: Final = 60.0
_INSIDE_MAX: Final = 64
_encode: Final = msgspec.json.Encoder().encode
_params: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_value: Final = msgspec.json.Decoder().decode
NOTHING_ALONG: Final = Along()
NO_SIGNALS: Final[Mapping[str, bytes]] = {}
NO_PARAMS: Final[Mapping[str, msgspec.Raw]] = {}
Ask = Callable[[Plan, Run, int], Run]


class PipelineEngine:
    """Executes definitions and moves runs on when their tasks end; implements `tasks.followers.Follower`."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        ids: IdSource,
        tasks: Settler,
        catalogue: Catalogue,
        shared: bool = False,
        free: Free | None = None,
        kept: StageResults | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self._tasks = tasks
        self._catalogue = catalogue
        self._plans = Plans(store)
        self._runs = Runs(store, self._plans, shared=shared, free=free, kept=kept)
        self.moved: Callable[[Run, Plan | None], None] = lambda _run, _plan: None
        self._waiters = Waiters()

    # --- definitions ----------------------------------------------------------------------------------------------

    async def check(self, actor: Actor, spec: PipelineSpec) -> builtins.list[str]:
        """See `Catalogue.check`."""
        return await self._catalogue.check(actor, spec)

    async def create(self, actor: Actor, spec: PipelineSpec) -> tuple[Pipeline, bool]:
        """See `Catalogue.create`."""
        return await self._catalogue.create(actor, spec)

    async def get(self, actor: Actor, ref: str, version: int | None = None) -> Pipeline:
        """See `Catalogue.get`."""
        return await self._catalogue.get(actor, ref, version)

    async def list(self, actor: Actor, *, cursor: str | None = None, limit: int = 50) -> Page[PipelineView]:
        """See `Catalogue.list`."""
        return await self._catalogue.list(actor, cursor=cursor, limit=limit)

    def view_pipeline(self, pipeline: Pipeline) -> PipelineView:
        """Return a definition as callers see it, with its spec."""
        return pipeline_view(pipeline, with_spec=True)

    async def execute(self, actor: Actor, ref: str, request: RunRequest, origin: Origin) -> tuple[Run, bool]:
        """Start a run, durable on return, and say whether it is new: the same idempotency key gives the run of then.

        Raises:
            NotFound: no such pipeline or version.
            Invalid: parameters, labels or priority; everything that is wrong.
            IdempotencyKeyInvalid, IdempotencyMismatch: the key, or another request under the same key.
        """
        allow(actor, "runs.execute")
        check_key(request.idempotency_key)
        digest = "" if request.idempotency_key is None else _digest(ref, request)
        if request.idempotency_key is not None:
            known = await self._repeated(actor, request, digest)
            if known is not None:
                return known, False
        pipeline = await self._catalogue.get(actor, ref, request.version)
        try:
            return await self.begin(actor, pipeline, request, origin, self._ids.new("run"), digest), True
        except Duplicate:
            known = await self._repeated(actor, request, digest)
            if known is None:
                raise
            return known, False

    async def begin(
        self,
        actor: Actor,
        pipeline: Pipeline,
        request: RunRequest,
        origin: Origin,
        run_id: str,
        digest: str = "",
        along: Along = NOTHING_ALONG,
        parent: Parent | None = None,
        due: int | None = None,
    ) -> Run:
        """Start a run under this id, in one change with what is to be committed along with it.

        Args:
            parent: what it is part of; due: the deadline of that.

        Raises:
            Invalid: parameters, labels or priority; everything that is wrong.
            Conflict: the id is taken, or what goes along was changed meanwhile; nothing was started.
        """
        check_request(request)
        params = {name: msgspec.Raw(text) for name, text in resolve(pipeline.spec.spec.params, request.params).items()}
        now = self._clock.now()
        run = new_run(actor, pipeline, request, origin, run_id=run_id, digest=digest, now=now, parent=parent, due=due)
        active = Active(run, await self._plans.of(pipeline), Material(params))
        decision = await self._runs.decide(active, run, (), now)
        created = [run_fact("run.created", run, actor.id, now)]
        cold = {"params": _encode(params)}
        advance = self._runs.propose(active, run, decision, now, actor=actor.id, facts=created, cold=cold)
        advance.writes.extend([*along.writes, *budget_writes(run, budget_of(pipeline, request))])
        advance.facts.extend(along.facts)
        await self._apply(actor, run.id, advance)
        return decision.run

    async def _repeated(self, actor: Actor, request: RunRequest, digest: str) -> Run | None:
        key = scoped(actor.tenant, actor.id, request.idempotency_key or "")
        rows = await self._store.find("run", Query(where=[Where("unique_key", "eq", key)], limit=1))
        if not rows:
            return None
        run = read_run(rows[0])
        if run.digest != digest:
            raise IdempotencyMismatch("this idempotency key was used for another run")
        return run

    # --- runs: read -----------------------------------------------------------------------------------------------

    async def run(self, actor: Actor, run_id: str) -> Run:
        """Return a run. Raises NotFound, the same for one that is not there and one of another tenant."""
        return (await self._load(actor, run_id)).run

    async def view(self, actor: Actor, run: Run) -> RunView:
        """Return a run as callers see it, with its parameters, what it gave, and the progress of running tasks in that of their stages."""
        plan = await self._plans.load(run.pipeline_id)
        params, output = self._runs.known(run)
        if params is None:
            entity = (await self._store.get("run", [run.id], ("params", "result") if run.has_output else ("params",)))[
                0
            ]
            params = {} if entity is None else _params(entity.cold.get("params", b"{}"))
            output = None if entity is None else entity.cold.get("result")
        inside: dict[str, float] = {}
        waited = [] if run.final or run.version == 1 else waited_for(run, plan, _INSIDE_MAX)
        for row in await self._store.get("task", waited) if waited else ():
            if row is not None and (task := read_task(row)).state is TaskState.RUNNING:
                stage = task.links.stage or ""
                inside[stage] = inside.get(stage, 0.0) + task.progress
        now = self._clock.now()
        return await off_loop(plan.spec, run_view, run, plan, now, params=params, inside=inside, output=output)

    async def wait(self, actor: Actor, run_id: str, seconds: float) -> Run:
        """Return a run when it has ended, or as it is after so many seconds, at most 60. Raises NotFound."""
        future = self._waiters.expect(run_id)
        try:
            run = await self.run(actor, run_id)
            if not run.final:
                ended = await self._waiters.wait(future, min(seconds, WAIT_MAX_SECONDS))
                run = ended or await self.run(actor, run_id)
            return run
        finally:
            self._waiters.abandon(run_id, future)

    async def runs(
        self,
        actor: Actor,
        *,
        state: RunState | None = None,
        pipeline: str | None = None,
        cursor: str | None = None,
        limit: int = 50,
        oldest_first: bool = False,
    ) -> Page[RunView]:
        """Return a page of runs for which all conditions given hold (`pipeline` is a name), newest first unless asked otherwise."""
        allow(actor, "runs.list")
        return await page(
            self._store, self._plans, actor.tenant, self._clock.now(), state, pipeline, cursor, limit, oldest_first
        )

    async def output(self, actor: Actor, run_id: str, stage: str) -> bytes:
        """Return the output of a stage as JSON. Raises NotFound while there is none."""
        run = (await self._load(actor, run_id)).run
        found = next((each for each in run.stages if each.id == stage and each.has_output), None)
        if found is None:
            raise NotFound("there is no such stage, or it has no output yet")
        if found.output:
            return found.output
        entity = (await self._store.get("run", [run_id], (f"output/{stage}",)))[0]
        if entity is None:
            raise NotFound("no such run")
        return entity.cold.get(f"output/{stage}", b"null")

    async def _load(self, actor: Actor, run_id: str, action: str = "runs.get") -> Active:
        allow(actor, action, run_id)
        active = await self._runs.load(run_id, fresh=True)
        if active is None or active.run.tenant != actor.tenant:
            raise NotFound("no such run")
        return active

    # --- runs: change ---------------------------------------------------------------------------------------------

    async def pause(self, actor: Actor, run_id: str, reason: str = "") -> Run:
        """Start nothing new in a run; its running tasks finish. Raises NotFound, InvalidTransition."""
        request = self._request(actor, reason)
        return await self.ask(actor, run_id, lambda _plan, run, _now: control.pause(run, request), "run.paused")

    async def resume(self, actor: Actor, run_id: str) -> Run:
        """Let a paused run go on. Raises NotFound, InvalidTransition."""
        return await self.ask(actor, run_id, lambda _plan, run, now: control.resume(run, now), "run.resumed")

    async def cancel(self, actor: Actor, run_id: str, reason: str = "") -> Run:
        """End a run: waiting tasks at once, running ones when their agents have stopped. Raises NotFound, InvalidTransition."""
        request = self._request(actor, reason)
        return await self.ask(actor, run_id, lambda _plan, run, _now: control.cancel(run, request), "", insist=True)

    async def retry(
        self,
        actor: Actor,
        run_id: str,
        from_stage: str | None = None,
        params: Mapping[str, msgspec.Raw] = NO_PARAMS,
        reason: str = "",
    ) -> Run:
        """Run again what did not complete, or everything from a stage on; `params` are those with other values from now on.

        Raises:
            NotFound: no such run.
            InvalidTransition: it has not failed or been cancelled.
            Invalid: the stage, the parameters, or both together; see `control.retry`.
        """
        request = self._request(actor, reason)
        active = await self._load(actor, run_id, "runs.change")
        before = await self._params(active)
        after = resolve(active.plan.spec.spec.params, {**before, **params}) if params else {}
        changed = {name for name in params if _value(after[name]) != _value(before.get(name, b"null"))}
        return await self.ask(
            actor,
            run_id,
            lambda plan, run, _now: control.retry(plan, run, request, from_stage, changed),
            "run.retried",
            anew={name: msgspec.Raw(text) for name, text in after.items()} if changed else before,
        )

    async def _params(self, active: Active) -> Mapping[str, msgspec.Raw]:
        if active.material.params is not None:
            return {name: msgspec.Raw(text) for name, text in active.material.params.items()}
        entity = (await self._store.get("run", [active.run.id], ("params",)))[0]
        return {} if entity is None else _params(entity.cold.get("params", b"{}"))

    def _request(self, actor: Actor, reason: str) -> Request:
        if errors := text_errors("#/reason", reason, 1000):
            raise Invalid(errors[0].detail, errors=errors)
        return Request(at=self._clock.now(), by=actor.id, reason=reason)

    async def ask(
        self,
        actor: Actor,
        run_id: str,
        ask: Ask,
        kind: str | Callable[[Run], Fact],
        *,
        finished: Sequence[Finished] = (),
        insist: bool = False,
        action: str = "runs.change",
        signals: Mapping[str, bytes] = NO_SIGNALS,
        anew: Mapping[str, msgspec.Raw] | None = None,
    ) -> Run:
        """Change a run as asked and do what follows from it; decide again when somebody else was faster.

        Args:
            kind: the fact to tell when the run changed by the asking itself, or what makes it.
            action: what the actor must be allowed to do.
            signals: bodies of signals that the asking adds, by id.
            anew: what is known of outputs no longer holds, and these are its parameters.
        """
        for _ in range(_TRIES):
            active = await self._load(actor, run_id, action)
            before, now = active.run, self._clock.now()
            run = ask(active.plan, before, now)
            if anew is not None:
                active = Active(before, active.plan, Material(anew))
            active.material.signals.update(signals)
            decision = await self._runs.decide(active, run, finished, now, insist=insist)
            if decision.run is before and not decision.cancel:
                break
            if decision.run is before:
                advance = Advance(cancel=decision.cancel)
            else:
                facts: builtins.list[Fact] = []
                if kind and run is not before:
                    facts = [run_fact(kind, run, actor.id, now) if isinstance(kind, str) else kind(run)]
                cold = {f"signal/{name}": body for name, body in signals.items()}
                if anew is not None:
                    cold["params"] = _encode(anew)
                closing = await self._runs.closing(active, before, decision)
                advance = self._runs.propose(
                    active, run, decision, now, actor=actor.id, facts=facts, cold=cold, closing=closing
                )
            try:
                await self._apply(actor, run_id, advance)
            except Duplicate:
                raise
            except Conflict:
                continue
            break
        else:
            raise Conflict("the run changes too fast; try again")
        return await self.run(actor, run_id)

    @property
    def in_hand(self) -> Runs:
        """The runs that are being worked on."""
        return self._runs

    async def _apply(self, actor: Actor, run_id: str, advance: Advance) -> None:
        try:
            await self._tasks.apply(run_id, advance, actor.tenant, actor.id)
        except BaseException:
            self.settled(run_id, advance, False)
            raise
        self.settled(run_id, advance, True)

    # --- the hook -------------------------------------------------------------------------------------------------

    def follow(self, run_id: str, finished: Sequence[Finished], now: int) -> Coroutine[None, None, Advance]:
        """See `Follower.follow`."""
        return self._runs.follow(run_id, finished, now)

    def settled(self, run_id: str, advance: Advance, ok: bool) -> None:
        """See `Follower.settled`."""
        run = self._runs.settled(run_id, advance, ok)
        if run is not None:
            if run.final:
                self._waiters.ended(run_id, run)
            self.moved(run, self._runs.plan_of(run_id))

    def heard(self, facts: Sequence[StoredFact]) -> None:
        """Hear that runs ended, by whatever server. Called with all facts, on the loop."""
        self._waiters.heard(facts)


def _digest(ref: str, request: RunRequest) -> str:
    body = msgspec.json.encode(replace(request, idempotency_key=None), order="deterministic")
    return sha256(ref.encode() + b"\x1f" + body).hexdigest()
