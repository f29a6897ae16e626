"""What the product asks its store: a store that writes it down, and the places in the source that ask."""

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

import mcp_control
from mcp_control.kernel.changes import Change, Entity, Kind, Query, StoredFact, Where
from mcp_control.kernel.errors import Problem
from mcp_control.storage.ports import Committed, Store

SOURCE: Final = Path(mcp_control.__file__).parent
_ASKING: Final = ("find", "count")


class AskedStore:
    """A `Store` that remembers from which functions it is asked for what index fields lead to.

    Attributes:
        places: `file:function` of every caller of `find` and `count`.
    """

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self.places: set[str] = set()

    def _note(self) -> None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code.co_name.startswith("<"):  # a comprehension
            frame = frame.f_back
        if frame is not None and frame.f_code.co_filename.startswith(str(SOURCE)):
            self.places.add(f"{Path(frame.f_code.co_filename).relative_to(SOURCE)}:{frame.f_code.co_name}")

    async def open(self, kinds: Sequence[Kind], committed: Committed) -> None:
        """See `Store`."""
        await self._inner.open(kinds, committed)

    async def close(self) -> None:
        """See `Store`."""
        await self._inner.close()

    async def commit(self, changes: Sequence[Change]) -> list[Problem | None]:
        """See `Store`."""
        return await self._inner.commit(changes)

    async def get(self, kind: str, ids: Sequence[str], cold: Sequence[str] = ()) -> list[Entity | None]:
        """See `Store`."""
        return await self._inner.get(kind, ids, cold)

    async def find(self, kind: str, query: Query) -> list[Entity]:
        """See `Store`; notes who asks."""
        self._note()
        return await self._inner.find(kind, query)

    async def count(self, kind: str, where: Sequence[Where], limit: int) -> int:
        """See `Store`; notes who asks."""
        self._note()
        return await self._inner.count(kind, where, limit)

    async def facts(self, after: int, limit: int) -> list[StoredFact]:
        """See `Store`."""
        return await self._inner.facts(after, limit)

    async def trim_facts(self, before_at: int, keep: int, limit: int) -> tuple[int, int]:
        """See `Store`."""
        return await self._inner.trim_facts(before_at, keep, limit)


def asking_places() -> set[str]:
    """Return `file:function` of every function of the product that calls `find` or `count` of a store."""
    found: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        name = str(path.relative_to(SOURCE))
        if name.startswith(("testing/", "storage/mongo/", "storage/sqlite/")):
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.AsyncFunctionDef) and any(_asks(call) for call in _own(function)):
                found.add(f"{name}:{function.name}")
    return found


def _own(function: ast.AsyncFunctionDef) -> Iterator[ast.AST]:
    """Yield what a function holds, without the functions inside it."""
    waiting: list[ast.AST] = [*function.body]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)


def _asks(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _ASKING):
        return False
    return ast.unparse(node.func.value).rpartition(".")[2].strip("_") == "store"
