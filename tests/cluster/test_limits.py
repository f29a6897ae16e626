"""A node of a cluster that is asked to end, one without file descriptors, and one with little memory (fault matrix, row 29)."""

import asyncio
import json
import re
import resource
import socket
import time
from contextlib import suppress
from pathlib import Path

import httpx2
import psutil
import pytest
import websockets

from mcp_control.testing.databases import RedisServer
from tests.cluster.harness import Cluster, port_of, running_cluster
from tests.cluster.peer import Peer, Socket
from tests.integration.support import API, in_state, say, submit, task, until

DRAIN_SECONDS = 20.0
FILES = 64
MEGABYTE = 1 << 20
CAP = 260 * MEGABYTE
FLOOD = 400  # submits at once, of a megabyte each
ROOM = 20  # as many as the server is told to handle at once


async def test_a_node_that_is_asked_to_end_drains_and_its_work_goes_on_elsewhere(
    mongo_uri: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    """SIGTERM: what was asked is answered, sockets close with 1012, exit 0 within 20 s; leases stay with their agents."""
    async with (
        running_cluster(tmp_path, mongo_uri, redis_server.url, count=2) as cluster,
        cluster.direct(0) as first,
        cluster.direct(1) as second,
    ):
        peer = await Peer.registered(first, "worker", "it.work")
        before = await Socket.opened(peer, cluster.servers[0].url)
        held = await submit(first, "it.work")
        given = await before.task()
        await before.started(given)
        reader = await websockets.connect(
            cluster.servers[0].url.replace("http", "ws", 1) + "/ws",
            additional_headers=cluster.headers,
            compression=None,
        )
        await reader.send(json.dumps({"op": "subscribe", "id": "s"}))
        await reader.recv()
        waiting = asyncio.create_task(first.get(f"{API}/tasks/{held}", params={"wait": 30}, timeout=40))
        asked = [asyncio.create_task(first.post(f"{API}/tasks", json={"type": "it.nobody"})) for _ in range(20)]
        done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        assert done
        began = time.monotonic()
        code = await asyncio.to_thread(cluster.servers[0].stop)
        took = time.monotonic() - began
        say(f"ended after {took:.1f} s")
        assert code == 0
        assert took <= DRAIN_SECONDS
        await reader.wait_closed()
        await before.connection.wait_closed()
        assert (reader.close_code, before.connection.close_code) == (1012, 1012)
        ended = await waiting
        assert (ended.status_code, ended.json()["code"], ended.headers["retry-after"]) == (503, "overloaded", "1")
        for answer in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(answer, BaseException):
                assert isinstance(answer, httpx2.TransportError), answer
            elif answer.status_code == 201:
                assert (await task(second, answer.json()["id"]))["state"] == "queued"
            else:
                assert answer.status_code == 503, answer.text
        found = await task(second, held)
        assert (found["state"], found["attempt"]) == ("running", 1)
        after = await Socket.opened(peer, cluster.servers[1].url)
        assert after.welcome["resumed"] == [held]
        assert "refused" not in await after.done(given, result="kept")
        found = await task(second, held)
        assert (found["state"], found["attempt"], found["result"]) == ("completed", 1, "kept")
        servers = (await second.get(f"{API}/status")).json()["cluster"]["servers"]
        assert [server["name"] for server in servers] == ["server-1"], "it said goodbye"

        async def leads() -> bool:
            return bool((await second.get(f"{API}/status")).json()["cluster"]["servers"][0]["leader"])

        await until(leads, 5, "the other one leads at once")
        await asyncio.to_thread(cluster.servers[0].start)
        await after.close()


async def test_a_node_without_file_descriptors_refuses_and_recovers(
    mongo_uri: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    """`ulimit -n 64`: further connections are refused or wait, the process lives, nothing accepted is lost, and then all is well."""
    async with (
        running_cluster(tmp_path, mongo_uri, redis_server.url, count=1) as cluster,
        cluster.direct(0) as client,
    ):
        server = cluster.servers[0]
        held = await submit(client, "it.nobody", "kept")
        _, most = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (FILES, most))
        taken: list[socket.socket] = []
        try:
            for _ in range(2 * FILES):
                one = socket.socket()
                one.setblocking(False)
                with suppress(BlockingIOError):
                    one.connect(("127.0.0.1", port_of(server.url)))
                taken.append(one)
            pid = server.pid
            async with cluster.direct(0, timeout=2.0) as late:
                try:
                    answer = await late.get("/health/live")
                    refused = answer.status_code == 503
                except (httpx2.TransportError, TimeoutError):
                    refused = True
            assert refused, "there was room after all: nothing was tried"
        finally:
            for one in taken:
                one.close()

        async def well() -> bool:
            async with cluster.direct(0, timeout=2.0) as fresh:
                with suppress(httpx2.TransportError, TimeoutError):
                    return (await fresh.get("/health/ready")).status_code == 200
                return False

        await until(well, 20, "the server is well again")
        assert server.pid == pid
        async with cluster.direct(0) as fresh:
            assert (await in_state(fresh, held, "queued"))["payload"] == "kept"
            assert (await in_state(fresh, await submit(fresh, "it.nobody"), "queued"))["state"] == "queued"


async def _flood(cluster: Cluster) -> tuple[dict[str, str], set[int]]:
    """Send more megabytes at once than the server may have; returns what was acknowledged, by key, and what else was answered."""
    acked: dict[str, str] = {}
    others: set[int] = set()
    payload = "x" * (MEGABYTE - 4096)

    async def one(client: httpx2.AsyncClient, number: int) -> None:
        body = {"type": "it.nobody", "payload": payload, "idempotency_key": f"k{number}"}
        try:
            answer = await client.post(f"{API}/tasks", json=body)
        except (httpx2.TransportError, TimeoutError):
            others.add(0)
            return
        if answer.status_code in (200, 201):
            acked[f"k{number}"] = answer.json()["id"]
        else:
            others.add(answer.status_code)

    async with cluster.direct(0, timeout=60) as client:
        await asyncio.gather(*[one(client, number) for number in range(FLOOD)])
    return acked, others


def _most_memory(pid: int) -> int:
    """Return the most bytes of memory that a process ever had."""
    [kilobytes] = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kilobytes) * 1024


@pytest.mark.long
@pytest.mark.parametrize("control", [False, True], ids=["product", "control"])
async def test_a_node_with_little_memory_refuses_and_loses_nothing(
    control: bool, mongo_uri: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    """A flood of large submits: what is too much gets 503, the process lives within its memory, and what was accepted is there.

    A server that lets all of them in takes more than it has (control).
    """
    room = {"overload__max_requests": 100_000 if control else ROOM, "overload__loop_lag_seconds": 60}
    async with running_cluster(tmp_path, mongo_uri, redis_server.url, count=1, **room) as cluster:
        server = cluster.servers[0]
        process = psutil.Process(server.pid)
        before = process.memory_info().rss
        acked, others = await _flood(cluster)
        peak = _most_memory(server.pid)
        say(f"{before // MEGABYTE} MiB, at most {peak // MEGABYTE}; {len(acked)} taken, others {others}")
        if control:
            assert peak > CAP
            return
        assert peak <= CAP
        assert others == {503}
        assert len(acked) >= ROOM / 2
        async with cluster.direct(0) as client:
            for task_id in acked.values():
                assert (await task(client, task_id))["state"] == "queued"
            assert (await in_state(client, await submit(client, "it.nobody"), "queued"))["state"] == "queued"
        assert process.is_running()
