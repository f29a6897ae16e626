"""Fixtures of the SDK's tests: a protocol peer on a real socket, and agents connected to it."""

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from mcp_control.sdk.agent import Agent
from mcp_control.sdk.profiles import Profiles
from tests.sdk.peer import Peer, serving

Running = Callable[[Agent], AbstractAsyncContextManager[Agent]]


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    peer = Peer()
    async with serving(peer) as url:
        peer.url = url
        yield peer


@pytest.fixture
def profiles(tmp_path: Path) -> Profiles:
    return Profiles(tmp_path / "config", {})


@pytest.fixture
def make_agent(peer: Peer, profiles: Profiles) -> Callable[..., Agent]:
    def make(**options: Any) -> Agent:
        profiles.save_agent_credential(peer.url, "worker", "mcpa_stored")
        return Agent("worker", url=peer.url, profiles=profiles, **{"slots": 8, "cancel_grace": 0.2, **options})

    return make


@pytest.fixture
def running() -> Running:
    @contextlib.asynccontextmanager
    async def run(agent: Agent) -> AsyncIterator[Agent]:
        await agent.start()
        try:
            yield agent
        finally:
            await agent.stop()

    return run
