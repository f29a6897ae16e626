"""What agents make of a load balancer that has no server for them right now."""

import socket

import pytest

from mcp_control.agents.model import AgentSpec, Beat
from mcp_control.sdk.runtime.links import LinkLost, SocketLink
from mcp_control.tasks.wire import Hello
from tests.cluster.relay import Relay


async def test_a_connection_that_ends_before_the_answer_is_lost_and_not_refused() -> None:
    """An agent tries again with a socket; it does not take the balancer for one that knows no sockets, and begin to poll."""

    async def nobody() -> socket.socket:
        raise ConnectionRefusedError

    relay = await Relay(nobody).start()
    try:
        hello = Hello(agent=AgentSpec(name="one"), software="tests", beat=Beat(tick=1))
        with pytest.raises(LinkLost):
            await SocketLink.open(relay.url, "mcpa_x", hello)
    finally:
        await relay.close()
