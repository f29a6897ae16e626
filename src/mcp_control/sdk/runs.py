"""Runs as a client watches and steers them."""

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Unpack

from mcp_control.artifacts.model import ArtifactView
from mcp_control.pipelines.input_model import SignalView
from mcp_control.pipelines.model import RunState
from mcp_control.pipelines.view_model import RunExplanation, RunView, StageExplanation
from mcp_control.sdk import approvals, calls
from mcp_control.sdk.errors import RunFailed
from mcp_control.sdk.usage import Added
from mcp_control.tasks.budget_model import Amounts, Budget, BudgetEdit, BudgetView
from mcp_control.tasks.view_model import TaskView

if TYPE_CHECKING:
    from mcp_control.sdk.client import AsyncClient, Client

_clock: Final = time.monotonic


def completed(view: RunView) -> RunView:
    """Return a run that completed. Raises RunFailed for one that ended otherwise."""
    if view.state is not RunState.COMPLETED:
        raise RunFailed(view)
    return view


class RunHandle:
    """A run at the server."""

    def __init__(self, client: "Client", run_id: str) -> None:
        self._client = client
        self.id = run_id

    def get(self) -> RunView:
        """Read the run."""
        return self._client.do(calls.get_run(self.id))

    def wait(self, timeout: float | None = None) -> RunView:
        """Wait for the end and return the run. Raises WaitTimeout."""
        return self._client.drive(calls.run_until_final(self.id, timeout, _clock))

    def result(self, timeout: float | None = None) -> RunView:
        """Wait for the run to complete. Raises RunFailed, WaitTimeout."""
        return completed(self.wait(timeout))

    def budget(self) -> BudgetView:
        """Read its budget and what was used of it. Raises Missing where it has none."""
        return self._client.do(calls.get_budget(self.id))

    def raise_budget(self, set: Budget | None = None, **add: Unpack[Added]) -> BudgetView:
        """Replace the limits that `set` names, and add to limits that are there; what waits for them goes on."""
        return self._client.do(calls.edit_budget(self.id, BudgetEdit(set=set, add=Amounts(**add))))

    def pause(self, reason: str | None = None) -> RunView:
        """Start no further tasks; what runs goes on."""
        return self._client.do(calls.run_verb(self.id, "pause", reason=reason))

    def resume(self) -> RunView:
        """Go on after a pause."""
        return self._client.do(calls.run_verb(self.id, "resume"))

    def cancel(self, reason: str | None = None) -> RunView:
        """Cancel the run and its tasks."""
        return self._client.do(calls.run_verb(self.id, "cancel", reason=reason))

    def retry(
        self,
        from_stage: str | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        reason: str | None = None,
    ) -> RunView:
        """Run the failed stages, or all from one stage on, once more; `params` are those that have other values from now on."""
        body = {"from_stage": from_stage, "params": params, "reason": reason}
        return self._client.do(calls.run_verb(self.id, "retry", **body))

    def signal(self, name: str, body: Any = None, *, key: str | None = None) -> SignalView:
        """Send the run a signal; repeated with the same key it is the same signal."""
        return self._client.do(approvals.signal(self.id, name, body, key))

    def signals(self) -> list[SignalView]:
        """Read the signals the run got, the first one first."""
        return list((self._client.do(approvals.signals(self.id))).items)

    def explain(self) -> RunExplanation:
        """Ask why it is not further: the first reason, who holds it, since when; and the same for each stage that has not ended."""
        return self._client.do(calls.explain_run(self.id))

    def explain_stage(self, stage: str) -> StageExplanation:
        """Ask why a stage is not further."""
        return self._client.do(calls.explain_stage(self.id, stage))

    def rerun_rejected(
        self, *, fixed: str | None = None, params: Mapping[str, Any] | None = None, key: str | None = None
    ) -> "RunHandle":
        """Start a run over what this one set aside, or over `fixed`, the artifact with the corrected records."""
        started = self._client.do(approvals.rerun_rejected(self.id, fixed, params, key))
        return RunHandle(self._client, started.id)

    def output(self, stage: str) -> Any:
        """Read the output of a stage."""
        return self._client.do(calls.stage_output(self.id, stage))

    def tasks(self, **filters: Any) -> Iterator[TaskView]:
        """Yield the run's tasks."""
        return self._client.pages(lambda cursor: calls.run_tasks(self.id, cursor=cursor, **filters))

    def artifacts(self) -> Iterator[ArtifactView]:
        """Yield the run's artifacts."""
        return self._client.pages(lambda cursor: calls.run_artifacts(self.id, cursor=cursor))


class Runs:
    """`client.runs`."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def get(self, run_id: str) -> RunView:
        """Read a run."""
        return self._client.do(calls.get_run(run_id))

    def handle(self, run_id: str) -> RunHandle:
        """Return a handle for a known id, without asking the server."""
        return RunHandle(self._client, run_id)

    def iter(self, **filters: Any) -> Iterator[RunView]:
        """Yield runs; filters are `state`, `pipeline`."""
        return self._client.pages(lambda cursor: calls.list_runs(cursor=cursor, **filters))


class AsyncRunHandle:
    """A run at the server, for the async client; the same names."""

    def __init__(self, client: "AsyncClient", run_id: str) -> None:
        self._client = client
        self.id = run_id

    async def get(self) -> RunView:
        """Read the run."""
        return await self._client.do(calls.get_run(self.id))

    async def wait(self, timeout: float | None = None) -> RunView:
        """Wait for the end and return the run. Raises WaitTimeout."""
        return await self._client.drive(calls.run_until_final(self.id, timeout, _clock))

    async def result(self, timeout: float | None = None) -> RunView:
        """Wait for the run to complete. Raises RunFailed, WaitTimeout."""
        return completed(await self.wait(timeout))

    async def budget(self) -> BudgetView:
        """Read its budget and what was used of it. Raises Missing where it has none."""
        return await self._client.do(calls.get_budget(self.id))

    async def raise_budget(self, set: Budget | None = None, **add: Unpack[Added]) -> BudgetView:
        """Replace the limits that `set` names, and add to limits that are there; what waits for them goes on."""
        return await self._client.do(calls.edit_budget(self.id, BudgetEdit(set=set, add=Amounts(**add))))

    async def pause(self, reason: str | None = None) -> RunView:
        """Start no further tasks; what runs goes on."""
        return await self._client.do(calls.run_verb(self.id, "pause", reason=reason))

    async def resume(self) -> RunView:
        """Go on after a pause."""
        return await self._client.do(calls.run_verb(self.id, "resume"))

    async def cancel(self, reason: str | None = None) -> RunView:
        """Cancel the run and its tasks."""
        return await self._client.do(calls.run_verb(self.id, "cancel", reason=reason))

    async def retry(
        self,
        from_stage: str | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        reason: str | None = None,
    ) -> RunView:
        """Run the failed stages, or all from one stage on, once more; `params` are those that have other values from now on."""
        body = {"from_stage": from_stage, "params": params, "reason": reason}
        return await self._client.do(calls.run_verb(self.id, "retry", **body))

    async def signal(self, name: str, body: Any = None, *, key: str | None = None) -> SignalView:
        """Send the run a signal; repeated with the same key it is the same signal."""
        return await self._client.do(approvals.signal(self.id, name, body, key))

    async def signals(self) -> list[SignalView]:
        """Read the signals the run got, the first one first."""
        return list((await self._client.do(approvals.signals(self.id))).items)

    async def explain(self) -> RunExplanation:
        """Ask why it is not further: the first reason, who holds it, since when; and the same for each stage that has not ended."""
        return await self._client.do(calls.explain_run(self.id))

    async def explain_stage(self, stage: str) -> StageExplanation:
        """Ask why a stage is not further."""
        return await self._client.do(calls.explain_stage(self.id, stage))

    async def rerun_rejected(
        self, *, fixed: str | None = None, params: Mapping[str, Any] | None = None, key: str | None = None
    ) -> "AsyncRunHandle":
        """Start a run over what this one set aside, or over `fixed`, the artifact with the corrected records."""
        started = await self._client.do(approvals.rerun_rejected(self.id, fixed, params, key))
        return AsyncRunHandle(self._client, started.id)

    async def output(self, stage: str) -> Any:
        """Read the output of a stage."""
        return await self._client.do(calls.stage_output(self.id, stage))

    def tasks(self, **filters: Any) -> AsyncIterator[TaskView]:
        """Yield the run's tasks."""
        return self._client.pages(lambda cursor: calls.run_tasks(self.id, cursor=cursor, **filters))

    def artifacts(self) -> AsyncIterator[ArtifactView]:
        """Yield the run's artifacts."""
        return self._client.pages(lambda cursor: calls.run_artifacts(self.id, cursor=cursor))


class AsyncRuns:
    """`client.runs` of the async client; the same names."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    async def get(self, run_id: str) -> RunView:
        """Read a run."""
        return await self._client.do(calls.get_run(run_id))

    def handle(self, run_id: str) -> AsyncRunHandle:
        """Return a handle for a known id, without asking the server."""
        return AsyncRunHandle(self._client, run_id)

    def iter(self, **filters: Any) -> AsyncIterator[RunView]:
        """Yield runs; filters are `state`, `pipeline`."""
        return self._client.pages(lambda cursor: calls.list_runs(cursor=cursor, **filters))
