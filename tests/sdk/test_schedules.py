"""Schedules as programs see them, blocking and awaited alike."""

import asyncio
import inspect
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mcp_control.sdk import schedules
from mcp_control.sdk.client import AsyncClient, Client
from mcp_control.sdk.errors import Conflicting, InvalidRequest, Missing
from mcp_control.testing.server import running_server

SPEC = {"name": "tidy", "every": 3600, "task": {"type": "work", "payload": "${{ run.date }}"}}


def _blocking(url: str, token: str) -> dict[str, Any]:
    """Use every verb of the blocking client."""
    with Client(url, token=token) as client:
        ahead = client.schedules.check(SPEC)
        made = client.schedules.create(SPEC)
        assert client.schedules.create(SPEC).id == made.id
        with pytest.raises(Conflicting):
            client.schedules.create({**SPEC, "every": 60})
        changed = client.schedules.apply({**SPEC, "every": 7200})
        assert client.schedules.get("tidy") == changed
        assert [one.name for one in client.schedules.iter()] == ["tidy"]
        first, second = client.schedules.next("tidy", 2)
        fire = client.schedules.trigger("tidy", "k")
        assert client.schedules.trigger("tidy", "k") == fire
        assert client.schedules.pause("tidy", "enough").state == "paused"
        since = datetime.now(UTC) - timedelta(hours=9)
        dry = client.schedules.backfill("tidy", since, datetime.now(UTC), width=2, dry_run=True)
        full = client.schedules.backfill("tidy", since, datetime.now(UTC), width=2)
        assert full.slots == dry.slots
        assert client.schedules.stop_backfill("tidy").backfill is None
        assert client.schedules.resume("tidy").state == "active"
        assert client.tasks.get(fire.target).type == "work"
        found = {
            "ahead": len(ahead),
            "apart": second.slot - first.slot,
            "dry": len(dry.slots or ()),
            "fires": [one.source for one in client.schedules.fires("tidy")],
        }
        client.schedules.delete("tidy")
        with pytest.raises(Missing):
            client.schedules.get("tidy")
        with pytest.raises(InvalidRequest, match="invalid-schedule"):
            client.schedules.create({**SPEC, "every": None, "cron": "0 0 30 2 *"})
        return found


async def _awaited(url: str, token: str) -> dict[str, Any]:
    """Use every verb of the async client."""
    async with AsyncClient(url, token=token) as client:
        ahead = await client.schedules.check(SPEC)
        made = await client.schedules.apply(SPEC)
        assert (await client.schedules.create(SPEC)).id == made.id
        changed = await client.schedules.apply({**SPEC, "every": 7200})
        assert await client.schedules.get("tidy") == changed
        assert [one.name async for one in client.schedules.iter()] == ["tidy"]
        first, second = await client.schedules.next("tidy", 2)
        await client.schedules.trigger("tidy")
        assert (await client.schedules.pause("tidy")).state == "paused"
        since = datetime.now(UTC) - timedelta(hours=9)
        dry = await client.schedules.backfill("tidy", since, datetime.now(UTC), dry_run=True)
        assert (await client.schedules.stop_backfill("tidy")).backfill is None
        assert (await client.schedules.resume("tidy")).state == "active"
        found = {
            "ahead": len(ahead),
            "apart": second.slot - first.slot,
            "dry": len(dry.slots or ()),
            "fires": [one.source async for one in client.schedules.fires("tidy")],
        }
        await client.schedules.delete("tidy")
        return found


async def test_every_verb_of_schedules_does_what_it_says(tmp_path: Path) -> None:
    """Both clients see the same: made once, changed, looked ahead, started by hand, paused, filled in, removed."""
    async with running_server(tmp_path / "server") as server:
        blocking = await asyncio.to_thread(_blocking, server.url, server.admin_token)
        assert blocking == await _awaited(server.url, server.admin_token)
        assert blocking == {"ahead": 5, "apart": timedelta(hours=2), "dry": 5, "fires": ["manual"]}


def test_both_clients_have_the_same_verbs() -> None:
    """Names and parameters are the same."""

    def verbs(kind: type) -> dict[str, Callable[..., Any]]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name: inspect.signature(member).parameters for name, member in found if name != "__init__"}  # type: ignore[misc]  # compared only

    assert verbs(schedules.Schedules) == verbs(schedules.AsyncSchedules)
