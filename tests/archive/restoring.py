"""A restore in a process of its own, for tests that kill it.

    python -m tests.archive.restoring BACKUP FOLDER

Says what it does, a line at a time, and `done` at the end.
"""

import asyncio
import sys
from pathlib import Path

from mcp_control.app import KINDS
from mcp_control.archive.restore import restore
from mcp_control.kernel.clock import SystemClock
from tests.archive.support import place_of


def say(text: str) -> None:
    """Write one line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


async def main(backup: Path, folder: Path) -> None:
    """Restore over whatever is there."""
    place = place_of(folder)
    say("begins")
    await restore(
        backup, place.archive, place.own_blobs, KINDS, now=SystemClock().now(), replace_old=True, progress=say
    )
    say("done")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
