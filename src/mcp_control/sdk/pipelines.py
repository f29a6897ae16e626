"""Pipelines as a client checks, applies, compares, plans, starts and deletes them."""

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Unpack
from urllib.parse import quote

import msgspec

from mcp_control.kernel.paging import Page
from mcp_control.pipelines.model import RunRequest
from mcp_control.pipelines.plan_model import Difference, PlanRequest, RunPlan
from mcp_control.pipelines.view_model import PipelineView, RunView
from mcp_control.sdk.calls import Request, query
from mcp_control.sdk.runs import AsyncRunHandle, RunHandle
from mcp_control.sdk.submission import Definition, DefinitionText, RunOptions, definition_text, encode_json, fresh_key
from mcp_control.sdk.transport import Call

if TYPE_CHECKING:
    from mcp_control.sdk.client import AsyncClient, Client


def _path(name: str, verb: str = "") -> str:
    return f"/pipelines/{quote(name, safe='')}{verb}"


def _get(type: Any, path: str, **params: object) -> Request[Any]:
    return Request(Call(path=path, params=query(params)), lambda reply: reply.json(type))


def _define(type: Any, path: str, definition: Definition) -> Request[Any]:
    text: DefinitionText = definition_text(definition)
    headers = (("Content-Type", text.media_type),)
    call = Call(method="POST", path=path, headers=headers, body=text.text, repeatable=True)
    return Request(call, lambda reply: reply.json(type))


def _raw(params: Mapping[str, object] | None) -> dict[str, msgspec.Raw]:
    return {key: msgspec.Raw(encode_json(value)) for key, value in (params or {}).items()}


def _plan(
    definition: Definition | None, params: Mapping[str, object] | None, name: str | None, version: int | None
) -> Request[RunPlan]:
    text = None if definition is None else definition_text(definition).text.decode()
    request = PlanRequest(definition=text, pipeline=name, version=version, params=_raw(params))
    call = Call(method="POST", path="/pipelines/plan", body=encode_json(request), repeatable=True)
    return Request(call, lambda reply: reply.json(RunPlan))


def _run(name: str, params: Mapping[str, object] | None, options: RunOptions) -> Request[RunView]:
    given: dict[str, Any] = dict(options)
    given["idempotency_key"] = given.pop("key", None) or fresh_key()
    if "labels" in given:
        given["labels"] = dict(given["labels"])
    request = RunRequest(params=_raw(params), **given)
    call = Call(method="POST", path=_path(name, "/execute"), body=encode_json(request), repeatable=True)
    return Request(call, lambda reply: reply.json(RunView))


def _delete(name: str, version: int | None) -> Request[None]:
    return Request(
        Call(method="DELETE", path=_path(name), params=query({"version": version}), repeatable=True), lambda _: None
    )


class Pipelines:
    """`client.pipelines`."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def apply(self, definition: Definition) -> PipelineView:
        """Give a definition: a built one, a spec, a mapping, YAML text, or the Path of a file. Unchanged ones make no new version."""
        found: PipelineView = self._client.do(_define(PipelineView, "/pipelines", definition))
        return found

    def validate(self, definition: Definition) -> dict[str, Any]:
        """Check a definition without keeping it. Raises InvalidRequest with all that is wrong, place by place."""
        found: dict[str, Any] = self._client.do(_define(dict[str, Any], "/pipelines/validate", definition))
        return found

    def plan(
        self,
        definition: Definition | None = None,
        params: Mapping[str, object] | None = None,
        *,
        name: str | None = None,
        version: int | None = None,
    ) -> RunPlan:
        """Forecast a run that began now, of a definition or, by `name`, of a pipeline. Raises InvalidRequest."""
        return self._client.do(_plan(definition, params, name, version))

    def run(self, name: str, params: Mapping[str, object] | None = None, **options: Unpack[RunOptions]) -> RunHandle:
        """Start a run; it gets a fresh idempotency key where none is given."""
        return RunHandle(self._client, (self._client.do(_run(name, params, options))).id)

    def get(self, name: str, version: int | None = None) -> PipelineView:
        """Read a definition, by default its newest version."""
        found: PipelineView = self._client.do(_get(PipelineView, _path(name), version=version))
        return found

    def diff(self, name: str, before: int | None = None, after: int | None = None) -> Difference:
        """Compare two versions, by default the newest with the one before it."""
        found: Difference = self._client.do(_get(Difference, _path(name, "/diff"), before=before, after=after))
        return found

    def delete(self, name: str, version: int | None = None) -> None:
        """Delete a version, or the pipeline with all of them. Raises Conflicting while a run or a schedule uses it."""
        self._client.do(_delete(name, version))

    def iter(self, **filters: Any) -> Iterator[PipelineView]:
        """Yield definitions, the newest version of each."""
        return self._client.pages(lambda cursor: _get(Page[PipelineView], "/pipelines", cursor=cursor, **filters))

    def versions(self, name: str) -> Iterator[PipelineView]:
        """Yield the versions of a pipeline, the newest first."""
        return self._client.pages(lambda cursor: _get(Page[PipelineView], _path(name, "/versions"), cursor=cursor))


class AsyncPipelines:
    """`client.pipelines` of the async client; the same names."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    async def apply(self, definition: Definition) -> PipelineView:
        """Give a definition: a built one, a spec, a mapping, YAML text, or the Path of a file. Unchanged ones make no new version."""
        found: PipelineView = await self._client.do(_define(PipelineView, "/pipelines", definition))
        return found

    async def validate(self, definition: Definition) -> dict[str, Any]:
        """Check a definition without keeping it. Raises InvalidRequest with all that is wrong, place by place."""
        found: dict[str, Any] = await self._client.do(_define(dict[str, Any], "/pipelines/validate", definition))
        return found

    async def plan(
        self,
        definition: Definition | None = None,
        params: Mapping[str, object] | None = None,
        *,
        name: str | None = None,
        version: int | None = None,
    ) -> RunPlan:
        """Forecast a run that began now, of a definition or, by `name`, of a pipeline. Raises InvalidRequest."""
        return await self._client.do(_plan(definition, params, name, version))

    async def run(
        self, name: str, params: Mapping[str, object] | None = None, **options: Unpack[RunOptions]
    ) -> AsyncRunHandle:
        """Start a run; it gets a fresh idempotency key where none is given."""
        return AsyncRunHandle(self._client, (await self._client.do(_run(name, params, options))).id)

    async def get(self, name: str, version: int | None = None) -> PipelineView:
        """Read a definition, by default its newest version."""
        found: PipelineView = await self._client.do(_get(PipelineView, _path(name), version=version))
        return found

    async def diff(self, name: str, before: int | None = None, after: int | None = None) -> Difference:
        """Compare two versions, by default the newest with the one before it."""
        found: Difference = await self._client.do(_get(Difference, _path(name, "/diff"), before=before, after=after))
        return found

    async def delete(self, name: str, version: int | None = None) -> None:
        """Delete a version, or the pipeline with all of them. Raises Conflicting while a run or a schedule uses it."""
        await self._client.do(_delete(name, version))

    def iter(self, **filters: Any) -> AsyncIterator[PipelineView]:
        """Yield definitions, the newest version of each."""
        return self._client.pages(lambda cursor: _get(Page[PipelineView], "/pipelines", cursor=cursor, **filters))

    def versions(self, name: str) -> AsyncIterator[PipelineView]:
        """Yield the versions of a pipeline, the newest first."""
        return self._client.pages(lambda cursor: _get(Page[PipelineView], _path(name, "/versions"), cursor=cursor))
