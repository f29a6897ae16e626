"""Groups as a client makes, watches and steers them."""

import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import msgspec

from mcp_control.kernel.paging import Page
from mcp_control.sdk import calls
from mcp_control.sdk.calls import LONG_POLL_SECONDS, Flow, Request, query
from mcp_control.sdk.errors import WaitTimeout
from mcp_control.sdk.submission import batches, encode_json, fresh_key
from mcp_control.sdk.transport import Call
from mcp_control.tasks.group_model import GROUP_FINAL, Added, Event, GroupView
from mcp_control.tasks.model import TaskSpec
from mcp_control.tasks.view_model import TaskView

if TYPE_CHECKING:
    from mcp_control.sdk.client import AsyncClient, Client

Member = TaskSpec | tuple[str, object] | str
"""A task of a group: its spec, or its type and payload, or its type alone."""
_clock: Final = time.monotonic


def _spec(member: Member) -> TaskSpec:
    if isinstance(member, TaskSpec):
        return member
    task_type, payload = (member, None) if isinstance(member, str) else member
    return TaskSpec(type=task_type, payload=msgspec.Raw(encode_json(payload)))


def _path(group_id: str, *more: str) -> str:
    return "/".join(["/groups", quote(group_id, safe=""), *more])


def _post(type: Any, path: str, body: object, *, repeatable: bool = True) -> Request[Any]:
    call = Call(method="POST", path=path, body=encode_json(body), repeatable=repeatable, timeout=60.0)
    return Request(call, lambda reply: reply.json(type))


def get(group_id: str, wait: float | None = None) -> Request[GroupView]:
    """Read a group; with `wait`, when it has ended or after so many seconds."""
    call = Call(path=_path(group_id), params=query({"wait": wait}), timeout=30.0 + (wait or 0.0), repeatable=True)
    return Request(call, lambda reply: reply.json(GroupView))


def listed(**filters: object) -> Request[Page[GroupView]]:
    """Read a page of groups."""
    call = Call(path="/groups", params=query(filters), repeatable=True)
    return Request(call, lambda reply: reply.json(Page[GroupView]))


def seal(group_id: str) -> Request[GroupView]:
    """Say that no more tasks come from outside."""
    return _post(GroupView, _path(group_id, "seal"), {})


def cancel(group_id: str, reason: str = "") -> Request[GroupView]:
    """Cancel all members."""
    return _post(GroupView, _path(group_id, "cancel"), {"reason": reason})


def retry(group_id: str) -> Request[GroupView]:
    """Have what failed tried again."""
    return _post(GroupView, _path(group_id, "retry"), {}, repeatable=False)


def _more(group_id: str, batch: Sequence[bytes], by: str | None, key: str) -> Request[Added]:
    body = {"tasks": [msgspec.Raw(each) for each in batch], "by": by, "idempotency_key": key}
    return _post(Added, _path(group_id, "tasks"), body)


def adding(group_id: str, tasks: Iterable[Member], by: str | None, key: str | None) -> Flow[Any]:
    """Add tasks, as many requests as it takes; returns the ids of all."""
    key = key or fresh_key()
    ids: list[str] = []
    for number, batch in enumerate(batches(encode_json(_spec(each)) for each in tasks)):
        added = yield _more(group_id, batch, by, f"{key}.{number}")
        ids += added.ids
    return ids


def creating(tasks: Iterable[Member], on: Mapping[Event, Member], name: str, open: bool, key: str | None) -> Flow[Any]:
    """Make a group; where its tasks need several requests, it is open until the last of them."""
    key = key or fresh_key()
    parts = list(batches(encode_json(_spec(each)) for each in tasks))
    body = {
        "name": name,
        "tasks": [msgspec.Raw(each) for each in (parts[0] if parts else ())],
        "on": {event: _spec(each) for event, each in on.items()},
        "open": open or len(parts) > 1,
        "idempotency_key": key,
    }
    view = yield _post(GroupView, "/groups", body)
    for number, batch in enumerate(parts[1:], 1):
        yield _more(view.id, batch, None, f"{key}.{number}")
    if len(parts) > 1:
        view = yield get(view.id) if open else seal(view.id)
    return view


def until_ended(group_id: str, timeout: float | None, clock: Callable[[], float]) -> Flow[GroupView]:
    """Wait for the end of a group. Raises WaitTimeout."""
    ends_at = None if timeout is None else clock() + timeout
    while True:
        left = LONG_POLL_SECONDS if ends_at is None else ends_at - clock()
        view = yield get(group_id, max(0.0, min(left, LONG_POLL_SECONDS)))
        if view.state in GROUP_FINAL:
            return view
        if ends_at is not None and clock() >= ends_at:
            raise WaitTimeout(f"group {group_id} has not ended after {timeout:g} seconds")


class GroupHandle:
    """A group at the server. `id` names it; everything else is asked for."""

    def __init__(self, client: "Client", group_id: str) -> None:
        self._client = client
        self.id = group_id

    def get(self) -> GroupView:
        """Read the group, with its members counted by state."""
        return self._client.do(get(self.id))

    def progress(self) -> float:
        """Return how many of its members have ended, 0 to 1."""
        return self.get().progress or 0.0

    def add(self, tasks: Iterable[Member], *, by: str | None = None, key: str | None = None) -> list[str]:
        """Add tasks, and return their ids. A task that is a member adds with `by=ctx.task_id`, also where the group is sealed."""
        found: list[str] = self._client.drive(adding(self.id, tasks, by, key))
        return found

    def seal(self) -> GroupView:
        """Say that no more tasks come from outside; the group ends when all its members have."""
        return self._client.do(seal(self.id))

    def wait(self, timeout: float | None = None) -> GroupView:
        """Wait for the end of the group and return it, however it ended. Raises WaitTimeout."""
        return self._client.drive(until_ended(self.id, timeout, _clock))

    def cancel(self, reason: str = "") -> GroupView:
        """Cancel all members; the group ends after the last of them."""
        return self._client.do(cancel(self.id, reason))

    def retry(self) -> GroupView:
        """Have the members tried again that did not complete: new tasks take their places."""
        return self._client.do(retry(self.id))

    def tasks(self, **filters: Any) -> Iterator[TaskView]:
        """Yield its members; the filters are those of `client.tasks.iter`."""
        return self._client.pages(lambda cursor: calls.list_tasks(cursor=cursor, group=self.id, **filters))


class Groups:
    """`client.groups`."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def create(
        self,
        tasks: Iterable[Member] = (),
        *,
        on: Mapping[Event, Member] | None = None,
        name: str = "",
        open: bool = False,
        key: str | None = None,
    ) -> GroupHandle:
        """Make a group of any number of tasks; they are durable when this returns. Raises ApiProblem, Unreachable.

        Args:
            tasks: specs, pairs of type and payload, or types.
            on: what is done once when all have `completed`, at the `first_failure`, or when it has `ended`, however.
            name: for people.
            open: more tasks will be added; `seal` says when that is over.
            key: doing it again with the same key and tasks returns the first group, and goes on where it broke off.
        """
        view: GroupView = self._client.drive(creating(tasks, on or {}, name, open, key))
        return GroupHandle(self._client, view.id)

    def get(self, group_id: str) -> GroupView:
        """Read a group, with its members counted by state."""
        return self._client.do(get(group_id))

    def handle(self, group_id: str) -> GroupHandle:
        """Return a handle for a known id, without asking the server."""
        return GroupHandle(self._client, group_id)

    def iter(self, **filters: Any) -> Iterator[GroupView]:
        """Yield groups, newest first; filters are `state` and `name`."""
        return self._client.pages(lambda cursor: listed(cursor=cursor, **filters))


class AsyncGroupHandle:
    """A group at the server, for the async client; the same names."""

    def __init__(self, client: "AsyncClient", group_id: str) -> None:
        self._client = client
        self.id = group_id

    async def get(self) -> GroupView:
        """Read the group, with its members counted by state."""
        return await self._client.do(get(self.id))

    async def progress(self) -> float:
        """Return how many of its members have ended, 0 to 1."""
        return (await self.get()).progress or 0.0

    async def add(self, tasks: Iterable[Member], *, by: str | None = None, key: str | None = None) -> list[str]:
        """Add tasks, and return their ids. A task that is a member adds with `by=ctx.task_id`, also where the group is sealed."""
        found: list[str] = await self._client.drive(adding(self.id, tasks, by, key))
        return found

    async def seal(self) -> GroupView:
        """Say that no more tasks come from outside; the group ends when all its members have."""
        return await self._client.do(seal(self.id))

    async def wait(self, timeout: float | None = None) -> GroupView:
        """Wait for the end of the group and return it, however it ended. Raises WaitTimeout."""
        return await self._client.drive(until_ended(self.id, timeout, _clock))

    async def cancel(self, reason: str = "") -> GroupView:
        """Cancel all members; the group ends after the last of them."""
        return await self._client.do(cancel(self.id, reason))

    async def retry(self) -> GroupView:
        """Have the members tried again that did not complete: new tasks take their places."""
        return await self._client.do(retry(self.id))

    def tasks(self, **filters: Any) -> AsyncIterator[TaskView]:
        """Yield its members; the filters are those of `client.tasks.iter`."""
        return self._client.pages(lambda cursor: calls.list_tasks(cursor=cursor, group=self.id, **filters))


class AsyncGroups:
    """`client.groups` of the async client; the same names."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    async def create(
        self,
        tasks: Iterable[Member] = (),
        *,
        on: Mapping[Event, Member] | None = None,
        name: str = "",
        open: bool = False,
        key: str | None = None,
    ) -> AsyncGroupHandle:
        """Make a group of any number of tasks; see `Groups.create`."""
        view: GroupView = await self._client.drive(creating(tasks, on or {}, name, open, key))
        return AsyncGroupHandle(self._client, view.id)

    async def get(self, group_id: str) -> GroupView:
        """Read a group, with its members counted by state."""
        return await self._client.do(get(group_id))

    def handle(self, group_id: str) -> AsyncGroupHandle:
        """Return a handle for a known id, without asking the server."""
        return AsyncGroupHandle(self._client, group_id)

    def iter(self, **filters: Any) -> AsyncIterator[GroupView]:
        """Yield groups, newest first; filters are `state` and `name`."""
        return self._client.pages(lambda cursor: listed(cursor=cursor, **filters))
