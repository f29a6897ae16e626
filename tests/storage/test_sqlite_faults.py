"""What the store on SQLite does when the process dies, the disk is full or broken, or the folder is not its own."""

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mcp_control.kernel.changes import Change, Key
from mcp_control.kernel.errors import Problem, StorageFull, StoreUnavailable
from mcp_control.storage.sqlite import folder
from mcp_control.storage.sqlite.store import SqliteStore, check_version
from mcp_control.testing.store_conformance import THING, fact, thing

_PROGRAM = [sys.executable, "-u", "-m", "tests.storage.committing"]


def _unexpected(problem: Problem) -> None:
    raise AssertionError(problem)


def _store(directory: Path, **options: object) -> SqliteStore:
    return SqliteStore(directory, **{"fatal": _unexpected, "ballast_bytes": 1 << 16, **options})


async def _open(store: SqliteStore) -> SqliteStore:
    await store.open([THING], lambda facts: None)
    return store


async def _until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this should have happened by now"
        await asyncio.sleep(0.01)


async def _acknowledged_are_there(directory: Path, acknowledged: list[str]) -> None:
    store = await _open(_store(directory))
    found = await store.get("thing", acknowledged, ["payload"])
    assert [(entity and entity.id, entity and entity.cold) for entity in found] == [
        (name, {"payload": b"p" * 300}) for name in acknowledged
    ]
    facts = await store.facts(0, 1_000_000)
    assert [item.seq for item in facts] == [*range(1, len(facts) + 1)]
    assert {item.fact.subject for item in facts} >= set(acknowledged)
    assert len(facts) == await store.count("thing", (), 1_000_000)
    await store.close()


def test_nothing_acknowledged_is_lost_by_kill_9(tmp_path: Path) -> None:
    """Whenever the server is killed, all it had acknowledged is there afterwards, and facts and entities agree."""
    acknowledged: list[str] = []
    moments = random.Random(7)
    for _ in range(6):
        process = subprocess.Popen([*_PROGRAM, str(tmp_path / "data")], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("open")
        wanted = moments.randrange(1, 3000)
        lines = [process.stdout.readline().strip() for _ in range(wanted)]
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
        process.wait()
        process.stdout.close()
        whole = rest[: rest.rfind("\n") + 1].split()  # the last line may be cut
        acknowledged += [*lines, *whole]
    assert len(acknowledged) > 1000
    asyncio.run(_acknowledged_are_there(tmp_path / "data", acknowledged))


def _acknowledged(lines: list[str]) -> list[str]:
    return [line for line in lines if re.fullmatch(r"\d+-\d+-\d+", line)]


def _under_strace(directory: Path, inject: str, commits: int = 200) -> tuple[int, list[str]]:
    command = [
        "strace",
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        "trace=fdatasync,fsync",
        "-e",
        f"inject={inject}",
        *_PROGRAM,
        str(directory),
    ]
    done = subprocess.run([*command, str(commits)], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.splitlines()


def test_a_failed_fsync_is_an_unknown_outcome_and_the_end_of_the_process(tmp_path: Path) -> None:
    """When the disk does not confirm a commit, its callers hear that it may have happened, nothing is written after it, and what was
    acknowledged before is there after a restart."""
    code, lines = _under_strace(tmp_path / "data", "fdatasync:error=EIO:when=20")
    assert code == 3, lines[-3:]
    assert "unknown" in lines
    assert any(line.startswith("fatal") for line in lines)
    assert lines.index("unknown") > 10
    acknowledged = _acknowledged(lines)
    assert not _acknowledged(lines[lines.index("unknown") :])
    assert len(acknowledged) > 10
    asyncio.run(_acknowledged_are_there(tmp_path / "data", acknowledged))


def test_killed_at_the_fsync_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    """Death between writing the log and its confirmation loses no acknowledged change."""
    acknowledged: list[str] = []
    for when in (9, 23, 40):
        _, lines = _under_strace(tmp_path / "data", f"fdatasync:signal=SIGKILL:when={when}")
        acknowledged += _acknowledged(lines)
    assert len(acknowledged) > 10
    asyncio.run(_acknowledged_are_there(tmp_path / "data", acknowledged))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"mounting a small disk is not permitted here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


async def test_a_full_disk_refuses_writes_keeps_reads_and_heals_itself(small_disk: Path) -> None:
    """Writes end in StorageFull and change nothing; reads and deletes work; seconds after there is space, writes do again."""
    store = await _open(_store(small_disk / "data", ballast_bytes=1 << 20))
    await store.commit([Change([thing("first", hot=b"x" * 1000)])])
    (small_disk / "filler").write_bytes(b"x" * (4 << 20))
    kept = ["first"]

    async def fill() -> None:
        for number in range(2000):
            await store.commit([Change([thing(f"i{number}", hot=b"x" * 10_000)], (), [fact("f")])])
            kept.append(f"i{number}")

    with pytest.raises(StorageFull):
        await fill()
    assert not store.writable
    assert not (small_disk / "data" / "ballast").exists()
    lost = f"i{len(kept) - 1}"
    assert [entity is not None for entity in await store.get("thing", [*kept, lost])] == [True] * len(kept) + [False]
    with pytest.raises(StorageFull):
        await store.commit([Change([thing("refused")])])
    assert await store.commit([Change((), [Key("thing", "first", 1)])]) == [None]
    (small_disk / "filler").unlink()
    await _until(lambda: store.writable)
    assert await store.commit([Change([thing("again")])]) == [None]
    assert (small_disk / "data" / "ballast").stat().st_size == 1 << 20
    await store.close()
    store = await _open(_store(small_disk / "data", ballast_bytes=1 << 20))
    assert None not in await store.get("thing", [*kept[1:], "again"])
    assert await store.get("thing", ["first"]) == [None]
    await store.close()


async def test_a_second_server_is_refused_with_the_number_of_the_first(tmp_path: Path) -> None:
    """One server per folder: the second hears in one line who holds it, the first is not disturbed, and the lock ends with it."""
    first = await _open(_store(tmp_path / "data"))
    with pytest.raises(StoreUnavailable, match=rf"in use by another server \(process {os.getpid()}\)") as refused:
        await _open(_store(tmp_path / "data"))
    assert "\n" not in refused.value.detail
    assert await first.commit([Change([thing("a")])]) == [None]
    await first.close()
    await (await _open(_store(tmp_path / "data"))).close()


async def test_child_processes_do_not_inherit_the_lock(tmp_path: Path) -> None:
    """A child that outlives its server does not keep the next server out."""
    store = await _open(_store(tmp_path / "data"))
    child = await asyncio.to_thread(subprocess.Popen, ["sleep", "60"], close_fds=False)
    try:
        await store.close()
        await (await _open(_store(tmp_path / "data"))).close()
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
async def test_a_network_file_system_is_refused(tmp_path: Path, kind: str) -> None:
    """Where locks and shared memory cannot be relied on, the server does not start."""
    with pytest.raises(StoreUnavailable, match="network file system"):
        await _open(_store(tmp_path / "data", filesystem_of=lambda path: kind))


def test_the_file_system_of_a_path_is_that_of_its_nearest_mount() -> None:
    """The type is read from the mount table, the deepest mount point that holds the path."""
    assert folder.filesystem_of(Path("/proc/self")) == "proc"
    assert folder.filesystem_of(Path("/")) != "proc"


@pytest.mark.parametrize("at", [0, 16, 18, 21, 44, 56, 68, 80])
async def test_a_damaged_header_is_refused_and_the_file_left_alone(tmp_path: Path, at: int) -> None:
    """A flipped byte in the header is reported in one line, and not a byte of the file changes."""
    store = await _open(_store(tmp_path / "data"))
    await store.commit([Change([thing("a")])])
    await store.close()
    path = tmp_path / "data" / "store.db"
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(StoreUnavailable, match="damaged") as refused:
        await _open(_store(tmp_path / "data"))
    assert "\n" not in refused.value.detail
    assert path.read_bytes() == damaged


async def test_damage_inside_is_found_after_an_unclean_end(tmp_path: Path) -> None:
    """After a crash the file is checked before it is used; damage is reported, and the file stays as it is."""
    run = [*_PROGRAM, str(tmp_path / "data"), "30"]
    process = await asyncio.to_thread(subprocess.run, run, capture_output=True, text=True, check=True)
    assert process.stdout.startswith("open")
    path = tmp_path / "data" / "store.db"
    store = await _open(_store(tmp_path / "data"))
    await store.commit([Change([thing("a")])])
    for name in ("store.db", "store.db-wal"):  # what a crash leaves: the log, and the mark that the store is open
        (tmp_path / name).write_bytes((tmp_path / "data" / name).read_bytes())
    await store.close()
    for name in ("store.db", "store.db-wal"):
        (tmp_path / "data" / name).write_bytes((tmp_path / name).read_bytes())
    damaged = bytearray(path.read_bytes())
    page = 4096
    for start in range(page * 4, len(damaged) - page, page * 2):
        damaged[start : start + 64] = b"\xff" * 64
    path.write_bytes(damaged)
    with pytest.raises(StoreUnavailable, match=r"damaged|malformed"):
        await _open(_store(tmp_path / "data"))
    assert path.read_bytes() == damaged


def test_an_sqlite_with_the_wal_reset_bug_is_refused() -> None:
    """The oldest SQLite that is safe in WAL mode is 3.51.3."""
    check_version("3.51.3")
    check_version("3.54.1")
    for version in ("3.40.1", "3.51.2"):
        with pytest.raises(StoreUnavailable, match=version):
            check_version(version)


async def test_a_file_of_a_newer_server_is_refused(tmp_path: Path) -> None:
    """A layout from the future is named as such instead of being misread."""
    store = await _open(_store(tmp_path / "data"))
    await store.close()
    path = tmp_path / "data" / "store.db"
    header = bytearray(path.read_bytes())
    header[60:64] = (99).to_bytes(4)  # PRAGMA user_version
    path.write_bytes(header)
    with pytest.raises(StoreUnavailable, match="newer"):
        await _open(_store(tmp_path / "data"))


async def test_nobody_else_may_read_the_data(tmp_path: Path) -> None:
    """Files are for the server's own account: folder 0700, files 0600."""
    store = await _open(_store(tmp_path / "data"))
    await store.commit([Change([thing("a")])])
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "data").iterdir()}
    assert {"lock", "store.db", "store.db-wal", "ballast"} <= modes.keys()
    assert set(modes.values()) == {0o600}
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
    await store.close()
