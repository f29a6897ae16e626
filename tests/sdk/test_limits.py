"""Limits as programs set them, blocking and awaited alike."""

import asyncio
import inspect
from pathlib import Path

import pytest

from mcp_control.sdk import limits
from mcp_control.sdk.client import AsyncClient, Client
from mcp_control.sdk.errors import InvalidRequest, Missing
from mcp_control.tasks.limit_model import LimitSpec, LimitView, Rate
from mcp_control.testing.server import running_server

SPEC = LimitSpec(rate=Rate(count=3, seconds=60))


def _blocking(url: str, token: str) -> LimitView:
    with Client(url, token=token) as client:
        made = client.limits.set("mail", SPEC)
        assert client.limits.get("mail") == made
        assert [one.name for one in client.limits.iter()] == ["mail"]
        with pytest.raises(InvalidRequest):
            client.limits.set("mail", {"concurrency": 0})
        client.limits.remove("mail")
        with pytest.raises(Missing):
            client.limits.get("mail")
        handle = client.tasks.submit("x", None, limits=[{"key": "k", "concurrency": 1}], unique={"key": "u"})
        assert [gate.key for gate in client.tasks.get(handle.id).limits] == ["k"]
        return made


async def _awaited(url: str, token: str) -> LimitView:
    async with AsyncClient(url, token=token) as client:
        made = await client.limits.set("mail", {"rate": {"count": 3, "seconds": 60}})
        assert await client.limits.get("mail") == made
        assert [one.name async for one in client.limits.iter()] == ["mail"]
        await client.limits.remove("mail")
        with pytest.raises(Missing):
            await client.limits.get("mail")
        return made


async def test_both_clients_do_the_same(tmp_path: Path) -> None:
    """Every verb, with the same outcome; both have the same verbs."""
    async with running_server(tmp_path / "server") as server:
        one = await asyncio.to_thread(_blocking, server.url, server.admin_token)
        two = await _awaited(server.url, server.admin_token)
    assert (one.name, one.rate, one.concurrency) == (two.name, two.rate, two.concurrency)

    def verbs(of: type) -> set[str]:
        return {name for name, _ in inspect.getmembers(of, inspect.isfunction) if not name.startswith("_")}

    assert verbs(limits.Limits) == verbs(limits.AsyncLimits)
