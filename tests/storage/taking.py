"""A server reduced to its queue, for tests with several processes that take at once.

    python -m tests.storage.taking URL NAMESPACE LANE together|naive

Waits for a line on its input, then takes from the lane until it is empty and prints the ids. `naive` is what the product must not do:
it reads the first entries and removes them in two steps.
"""

import asyncio
import sys

from mcp_control.storage.redis.connection import RedisClient, connect, disconnect
from mcp_control.storage.redis.queue import RedisQueue

_TAKERS = 4
_LIMIT = 5


async def _naive(client: RedisClient, namespace: str, lane: str) -> list[str]:
    line = f"{{{namespace}:lane:{lane}}}:ranked"
    members = await client.execute_command("ZRANGE", line, 0, _LIMIT - 1)
    if members:
        await client.execute_command("ZREM", line, *members)
    return [member.decode() for member in members]


async def main(url: str, namespace: str, lane: str, way: str) -> None:
    """Take until there is nothing left."""
    client = connect(url)
    queue = RedisQueue(client, namespace)
    taken: list[str] = []

    async def take() -> None:
        while True:
            if way == "naive":
                ids = await _naive(client, namespace, lane)
            else:
                ids = [entry.id for entry in await queue.take(lane, _LIMIT)]
            if not ids:
                return
            taken.extend(ids)

    await queue.depths()  # connects
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    await asyncio.gather(*(take() for _ in range(_TAKERS)))
    await disconnect(client)
    sys.stdout.write(" ".join(taken) + "\n")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
