"""A full disk and a disk that fails (reliability, faults 4 and 5), on a real file system and under strace."""

import asyncio
import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcp_control.testing.server import ServerProcess
from tests.integration.support import (
    API,
    AgentProcess,
    admin,
    agents_online,
    all_final,
    check_history,
    enrolment,
    in_state,
    read_store,
    say,
    submit,
    until,
    violations,
    wait_for,
)

pytestmark = [pytest.mark.embedded, pytest.mark.usefixtures("backend")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 72 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=72m", "tmpfs", str(mount)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"mounting a small disk is not permitted here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


async def test_a_full_disk_refuses_writes_keeps_reads_and_heals_itself(small_disk: Path, tmp_path: Path) -> None:
    """503 `storage-full` with Retry-After, reads 200, not ready; with space again all is well and nothing is lost."""
    server = ServerProcess(small_disk / "server").start()
    agent: AgentProcess | None = None
    acknowledged: dict[str, str] = {}
    try:
        async with admin(server) as client:
            agent = AgentProcess(tmp_path, "worker", server.url, await enrolment(client), slots=4, lease=60).start()
            await agents_online(client, ["worker"])
            go, notes = tmp_path / "go", tmp_path / "journal"
            running = await submit(
                client, "it.hold", {"until": str(go), "journal": str(notes)}, idempotency_key="running"
            )
            acknowledged["running"] = running
            await in_state(client, running, "running")
            filler = small_disk / "filler"
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - (2 << 20)))
            payload = "x" * 200_000
            refused = None
            for number in range(500):
                key = f"full-{number}"
                answer = await client.post(
                    f"{API}/tasks", json={"type": "it.echo", "payload": payload, "idempotency_key": key}
                )
                if answer.status_code != 201:
                    refused = answer
                    break
                acknowledged[key] = answer.json()["id"]
            assert refused is not None, "the disk was never full"
            assert (refused.status_code, refused.json()["code"]) == (503, "storage-full"), refused.text
            assert refused.json()["retryable"] is True
            assert float(refused.headers["retry-after"]) > 0
            again = await client.post(f"{API}/tasks", json={"type": "it.echo"})
            assert (again.status_code, again.json()["code"]) == (503, "storage-full")
            assert (await client.get("/health/ready")).status_code == 503
            assert (await client.get("/health/live")).status_code == 200
            for path in (f"/tasks/{running}", "/tasks", "/agents", "/status", "/events", "/auth/me"):
                answer = await client.get(API + path)
                assert answer.status_code == 200, (path, answer.text)
            found = await client.post(f"{API}/tasks/get", json={"ids": list(acknowledged.values())})
            assert all(found.json()["items"])
            go.touch()  # a result that cannot be recorded now; the agent must keep it
            filler.unlink()
            freed = time.monotonic()

            async def ready() -> bool:
                return (await client.get("/health/ready")).status_code == 200

            await until(ready, 5, "the server takes writes again")
            say(
                f"{len(acknowledged)} acknowledged before the disk was full; healed after {time.monotonic() - freed:.2f} s"
            )
            acknowledged["after"] = await submit(client, "it.echo", 1, idempotency_key="after")
            await all_final(client, 40)
            assert await violations(client) == {}
    finally:
        if agent is not None:
            agent.kill()
        assert server.stop() == 0
    check_history(await read_store(small_disk / "server" / "data"), acknowledged)


@contextlib.contextmanager
def _failing_fdatasync(pid: int) -> Iterator[None]:
    """Let every fdatasync of a process fail from now on."""
    tracer = subprocess.Popen(
        [
            "strace",
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            "trace=fdatasync",
            "-e",
            "inject=fdatasync:error=EIO",
            "-p",
            str(pid),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def attached() -> bool:
        statuses = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
        return bool(statuses) and not any("TracerPid:\t0\n" in status for status in statuses)

    try:
        wait_for(attached, 10, "strace has every thread")
        yield
    finally:
        tracer.terminate()
        tracer.wait(timeout=10)


async def test_a_disk_that_confirms_nothing_ends_the_server_with_an_error(tmp_path: Path) -> None:
    """fsync fails: the outcome is told as unknown, the process ends non-zero, a clean start has all that was acknowledged."""
    server = ServerProcess(tmp_path / "server").start()
    acknowledged: dict[str, str] = {}
    async with admin(server) as client:
        for number in range(50):
            acknowledged[f"k{number}"] = await submit(client, "it.echo", number, idempotency_key=f"k{number}")
        with _failing_fdatasync(server.pid):
            answer = await client.post(
                f"{API}/tasks", json={"type": "it.echo", "payload": 1, "idempotency_key": "doubt"}
            )
            failed = time.monotonic()
            assert (answer.status_code, answer.json()["code"]) == (503, "outcome-unknown"), answer.text
            code = await asyncio.to_thread(server.ended, 10)
            say(f"ended with {code} after {time.monotonic() - failed:.2f} s")
            assert code > 0
    assert server.stop() == code
    server.start()
    agent: AgentProcess | None = None
    try:
        async with admin(server) as client:
            assert (await client.get("/health/ready")).status_code == 200
            again = await client.post(
                f"{API}/tasks", json={"type": "it.echo", "payload": 1, "idempotency_key": "doubt"}
            )
            assert again.status_code in (200, 201), again.text
            acknowledged["doubt"] = again.json()["id"]
            agent = AgentProcess(tmp_path, "worker", server.url, await enrolment(client)).start()
            assert await all_final(client, 30) == {"completed": len(acknowledged)}
    finally:
        if agent is not None:
            agent.kill()
        assert server.stop() == 0
    check_history(await read_store(tmp_path / "server" / "data"), acknowledged)
