"""A server reduced to its store, for tests that kill it or break its disk.

    python -m tests.storage.committing DIRECTORY [COMMITS]

Commits one change after another, ten at a time, and prints the ids of each call when it returned. Prints `full` or `unknown` for a commit
that ended so, `fatal` when the store gave up, and then exits with 3.
"""

import asyncio
import sys
from pathlib import Path

from mcp_control.kernel.changes import Change, Entity, Fact
from mcp_control.kernel.errors import OutcomeUnknown, Problem, StorageFull, StoreUnavailable
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.testing.store_conformance import THING


def say(text: str) -> None:
    """Write one line at once: what the parent has read was said before the process died."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


async def main(directory: Path, commits: int) -> int:
    """Commit until told enough, or until the disk fails."""
    failed = asyncio.Event()

    def fatal(problem: Problem) -> None:
        say(f"fatal {problem.detail}")
        failed.set()

    store = SqliteStore(directory, fatal=fatal, ballast_bytes=1 << 16, checkpoint_pages=64)
    await store.open([THING], lambda facts: None)
    start = await store.count("thing", (), 1_000_000)
    say(f"open {start}")

    async def client(number: int) -> None:
        for at in range(commits):
            identifier = f"{start}-{number}-{at}"
            change = Change(
                [Entity("thing", identifier, 0, {"state": "new"}, b"h" * 200, {"payload": b"p" * 300})],
                (),
                [Fact("thing.made", identifier, "t", 1, "system")],
            )
            try:
                (outcome,) = await store.commit([change])
            except OutcomeUnknown:
                return say("unknown")
            except StorageFull:
                return say("full")
            except StoreUnavailable:
                return None
            assert outcome is None
            say(identifier)
        return None

    await asyncio.gather(*(client(number) for number in range(10)))
    if failed.is_set():
        return 3
    await store.close()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10**9)))
