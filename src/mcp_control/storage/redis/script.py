"""Runs the Lua scripts of this package by digest, and gives a server the script when it does not have it (yet, or any more)."""

from collections.abc import Sequence
from hashlib import sha1
from importlib.resources import files
from typing import Any, Final

from redis.asyncio import RedisCluster
from redis.exceptions import NoScriptError

from mcp_control.storage.redis.connection import RedisClient

_AT_ONCE: Final = 200
Arguments = Sequence[str | bytes | int]


class Script:
    """One script. Its keys always lie in one hash slot."""

    def __init__(self, name: str) -> None:
        self._text = files("mcp_control.storage.redis.scripts").joinpath(f"{name}.lua").read_bytes()
        self._digest = sha1(self._text, usedforsecurity=False).hexdigest()

    async def run(self, client: RedisClient, keys: Sequence[str], *arguments: str | bytes | int) -> Any:
        """Run it once and return its answer. Raises what redis-py raises."""
        try:
            return await client.execute_command("EVALSHA", self._digest, len(keys), *keys, *arguments)
        except NoScriptError:
            return await client.execute_command("EVAL", self._text, len(keys), *keys, *arguments)

    async def run_all(
        self, client: RedisClient, calls: Sequence[tuple[Sequence[str], Arguments]], then: Sequence[str] = ()
    ) -> list[Any]:
        """Run it for each pair of keys and arguments, in one round trip for up to 200, and return the answers.

        `then` is a command to run after all of them. A cluster runs it when they have answered, since it may be for another server.
        """
        answers: list[Any] = []
        for first in range(0, len(calls), _AT_ONCE):
            some = calls[first : first + _AT_ONCE]
            pipe = client.pipeline(transaction=False)
            for keys, arguments in some:
                pipe.execute_command("EVALSHA", self._digest, len(keys), *keys, *arguments)
            together = bool(then) and first + _AT_ONCE >= len(calls) and not isinstance(client, RedisCluster)
            if together:
                pipe.execute_command(*then)
            found: list[Any] = await pipe.execute(raise_on_error=False)
            if together and isinstance(last := found.pop(), Exception):
                raise last
            for answer, (keys, arguments) in zip(found, some, strict=True):
                if isinstance(answer, NoScriptError):
                    answer = await self.run(client, keys, *arguments)
                if isinstance(answer, Exception):
                    raise answer
                answers.append(answer)
        if then and isinstance(client, RedisCluster):
            await client.execute_command(*then)
        return answers
