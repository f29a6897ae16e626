"""The store on one SQLite file, for one server process on one machine.

One connection writes (`writer.py`). Reads that an index leads straight to are answered on the event-loop thread, from a read connection,
in some ten microseconds; all others run in a small pool of threads with connections of their own. A reader sees a transaction when its
COMMIT is durable and not before, so nothing that was read rolls back.
"""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import apsw
import structlog

from mcp_control.kernel.changes import Change, Entity, Kind, Query, StoredFact, Where
from mcp_control.kernel.errors import Problem, StoreUnavailable
from mcp_control.storage.ports import Committed
from mcp_control.storage.sqlite import factlog, folder, queries
from mcp_control.storage.sqlite.apply import Applier
from mcp_control.storage.sqlite.schema import Table, migrate
from mcp_control.storage.sqlite.writer import GroupCommit

_log = structlog.get_logger(__name__)
T = TypeVar("T")
_Execute = Callable[..., Any]

_OLDEST_SQLITE: Final = (3, 51, 3)  # before it, a checkpoint at the wrong moment could corrupt a database in WAL mode
_QUICK_CHECK_BYTES: Final = 1 << 30  # a check reads the whole file
_SHORT_LIST: Final = 64
_FULL_RETRY: Final = 1.0
_GIVE_WAY: Final = 0.0001
_GIVE_WAY_EVERY: Final = 0.001
_DATABASE: Final = "store.db"


class SqliteStore:
    """A `Store` in a folder.

    Args:
        directory: the data folder; made when absent.
        fatal: called on the loop when the disk failed and its state is unknown. The process should end with an error.
        max_waiting: changes that may wait for a commit before `Overloaded`.
        batch_writes: entity writes after which a physical commit takes no further calls.
        slice_writes: entity writes after which other work on the loop gets its turn.
        checkpoint_pages: pages of 4 KiB in the write-ahead log after which it is copied into the database.
        ballast_bytes: space held back for a full disk.
        readers: threads for the longer reads.
        filesystem_of: tells the type of a path's file system.
    """

    def __init__(
        self,
        directory: Path,
        *,
        fatal: Callable[[Problem], None],
        max_waiting: int = 20_000,
        batch_writes: int = 1024,
        slice_writes: int = 256,
        checkpoint_pages: int = 4096,
        ballast_bytes: int = 16 << 20,
        readers: int = 2,
        filesystem_of: folder.FilesystemOf = folder.filesystem_of,
    ) -> None:
        self._directory = directory
        self._path = directory / _DATABASE
        self._fatal = fatal
        self._max_waiting = max_waiting
        self._batch_writes = batch_writes
        self._slice_writes = slice_writes
        self._checkpoint_pages = checkpoint_pages
        self._ballast = folder.Ballast(directory / "ballast", ballast_bytes)
        self._readers = readers
        self._filesystem_of = filesystem_of
        self._tables: dict[str, Table] = {}
        self._lock: int | None = None
        self._writer: GroupCommit | None = None  # while open
        self._failed = False
        self._reading = 0
        self._giving_way = False
        self._connections: list[apsw.Connection] = []
        self._connection_of = threading.local()

    @property
    def writable(self) -> bool:
        """Whether commits are accepted: false while the disk is full, after it failed, and when closed."""
        return self._writer is not None and not self._failed and not self._writer.read_only

    @property
    def waiting(self) -> int:
        """Changes that wait for a commit."""
        return self._writer.waiting if self._writer is not None else 0

    # --- open and close -------------------------------------------------------------------------------------------

    async def open(self, kinds: Sequence[Kind], committed: Committed) -> None:
        """See `Store.open`."""
        self._tables = {kind.name: Table(kind) for kind in kinds}
        self._loop = asyncio.get_running_loop()
        self._failed = False
        newest_seq = await asyncio.to_thread(self._open_files, kinds)
        writing, reading = self._connections
        self._read = reading.cursor().execute
        self._pool = ThreadPoolExecutor(self._readers, thread_name_prefix="sqlite-read")
        self._writer = GroupCommit(
            writing,
            Applier(writing, self._tables),
            committed,
            self._loop,
            newest_seq=newest_seq,
            max_waiting=self._max_waiting,
            batch_writes=self._batch_writes,
            slice_writes=self._slice_writes,
            checkpoint_pages=self._checkpoint_pages,
            full=self._disk_full,
            fatal=self._disk_failed,
        )
        if not self._ballast.take():
            self._writer.read_only = True
            self._disk_full()

    def _open_files(self, kinds: Sequence[Kind]) -> int:
        check_version(apsw.sqlite_lib_version())
        folder.prepare(self._directory, self._filesystem_of)
        self._lock = folder.lock(self._directory)
        try:
            folder.check_header(self._path)
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            writing = self._connect(reader=False)
            self._check(writing)
            migrate(writing, kinds)
            writing.execute("""INSERT OR REPLACE INTO ".meta" VALUES('open', 1)""")
            self._connect(reader=True)
            return factlog.newest_seq(writing)
        except BaseException as error:
            self._close_connections(checkpoint=False)
            self._unlock()
            if isinstance(error, (apsw.Error, OSError)):
                raise StoreUnavailable(f"the database {self._path} cannot be opened: {error}") from error
            raise

    def _check(self, writing: apsw.Connection) -> None:
        """After an unclean end, look for damage; a large file gets the check of its header and of the log alone."""
        has_meta = writing.execute("""SELECT 1 FROM sqlite_schema WHERE name = '.meta'""").fetchall()
        if not has_meta or not writing.execute("""SELECT 1 FROM ".meta" WHERE key = 'open' AND value = 1""").fetchall():
            return
        size = self._path.stat().st_size
        if size > _QUICK_CHECK_BYTES:
            _log.warning(
                "store-check-skipped",
                reason="the last shutdown was unclean; the file is too large to check at start",
                bytes=size,
            )
            return
        found = [line for (line,) in writing.execute("PRAGMA quick_check(1)")]
        if found != ["ok"]:
            raise StoreUnavailable(
                f"the database {self._path} is damaged ({found[0]}); restore a backup. The file was not touched"
            )

    def _connect(self, *, reader: bool) -> apsw.Connection:
        connection = apsw.Connection(str(self._path), statementcachesize=512)
        self._connections.append(connection)
        # A damaged file must stay as it was found, so closing copies the log only after a clean run.
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 1)
        own = "query_only=ON" if reader else "journal_size_limit=67108864"
        for pragma in (
            "trusted_schema=OFF",
            "journal_mode=WAL",
            "synchronous=FULL",
            "temp_store=MEMORY",
            "cache_size=-65536",
            own,
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        connection.set_busy_timeout(5000 if reader else 0)
        if reader:
            connection.wal_autocheckpoint(0)
        return connection

    async def close(self) -> None:
        """See `Store.close`."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        await writer.close()
        await asyncio.to_thread(self._close_files, not self._failed and not writer.read_only)

    def _close_files(self, writable: bool) -> None:
        self._pool.shutdown()
        if writable:
            self._connections[0].execute("""DELETE FROM ".meta" WHERE key = 'open'""")
        self._close_connections(checkpoint=not self._failed)
        self._unlock()

    def _close_connections(self, *, checkpoint: bool) -> None:
        for connection in reversed(self._connections):
            if checkpoint:
                connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
            connection.close(True)
        self._connections = []
        self._connection_of = threading.local()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # --- the contract ---------------------------------------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[Problem | None]:
        """See `Store.commit`."""
        if not changes:
            return []
        return await self._open_writer().submit(changes)

    async def get(self, kind: str, ids: Sequence[str], cold: Sequence[str] = ()) -> list[Entity | None]:
        """See `Store.get`."""
        self._open_writer()
        table = self._table(kind)
        if len(ids) <= _SHORT_LIST:
            return self._on_loop(lambda: _get(self._read, table, ids, cold))
        return await self._in_pool(lambda connection: _get(connection.execute, table, ids, cold))

    async def find(self, kind: str, query: Query) -> list[Entity]:
        """See `Store.find`."""
        self._open_writer()
        table = self._table(kind)
        statements = queries.find_sql(table, query)
        if queries.is_led(table.kind, query):
            # What is looked for again and again, such as what has come due, is mostly not there: that is seen here.
            found = self._on_loop(lambda: _find(self._read, table, query, statements, min(query.limit, _SHORT_LIST)))
            if len(found) < _SHORT_LIST or query.limit <= _SHORT_LIST:
                return found
        return await self._in_pool(lambda connection: _find(connection.execute, table, query, statements, query.limit))

    async def count(self, kind: str, where: Sequence[Where], limit: int) -> int:
        """See `Store.count`."""
        self._open_writer()
        sql, values = queries.count_sql(self._table(kind), where, limit)

        def read(connection: apsw.Connection) -> int:
            rows: Any = connection.execute(sql, values).fetchall()
            return int(rows[0][0])

        return await self._in_pool(read)

    async def facts(self, after: int, limit: int) -> list[StoredFact]:
        """See `Store.facts`."""
        self._open_writer()
        return await self._in_pool(lambda connection: factlog.read(connection, after, limit))

    async def trim_facts(self, before_at: int, keep: int, limit: int) -> tuple[int, int]:
        """See `Store.trim_facts`. Facts go by whole physical commits, so some may stay a little longer than asked."""

        def job(connection: apsw.Connection, newest: int) -> tuple[int, int]:
            return factlog.trim(connection, newest, before_at, keep, limit), newest

        found: tuple[int, int] = await self._open_writer().run(job)
        return found

    # --- inside ---------------------------------------------------------------------------------------------------

    def _table(self, kind: str) -> Table:
        table = self._tables.get(kind)
        if table is None:
            raise ValueError(f"kind {kind} was not declared when the store was opened")
        return table

    def _open_writer(self) -> GroupCommit:
        if self._writer is None:
            raise StoreUnavailable("the store is not open")
        return self._writer

    def _on_loop(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except apsw.Error as error:
            raise _unreadable(error) from error

    async def _in_pool(self, read: Callable[[apsw.Connection], T]) -> T:
        def run() -> T:
            connection = getattr(self._connection_of, "connection", None)
            if connection is None:
                connection = self._connection_of.connection = self._connect(reader=True)
            return read(connection)

        self._reading += 1
        if not self._giving_way:
            self._giving_way = True
            self._loop.call_later(_GIVE_WAY_EVERY, self._give_way)
        try:
            return await self._loop.run_in_executor(self._pool, run)
        except apsw.Error as error:
            raise _unreadable(error) from error
        finally:
            self._reading -= 1

    def _give_way(self) -> None:
        """While threads read, leave them the interpreter lock from time to time: a busy loop would starve them (see `writer.py`)."""
        self._giving_way = self._reading > 0
        if self._giving_way:
            time.sleep(_GIVE_WAY)
            self._loop.call_later(_GIVE_WAY_EVERY, self._give_way)

    def _disk_failed(self, problem: Problem) -> None:
        self._failed = True
        _log.critical("store-failed", detail=problem.detail)
        self._fatal(problem)

    def _disk_full(self) -> None:
        """Give up the ballast, so that deletes and the log's checkpoint work, and look again for space until there is some."""
        _log.error("disk-full", folder=str(self._directory))
        self._ballast.give()
        self._loop.call_later(_FULL_RETRY, self._look_for_space)

    def _look_for_space(self) -> None:
        if self._writer is None:
            return
        if self._ballast.take():
            self._writer.read_only = False
            _log.info("disk-has-space", folder=str(self._directory))
        else:
            self._loop.call_later(_FULL_RETRY, self._look_for_space)


def _unreadable(error: apsw.Error) -> StoreUnavailable:
    return StoreUnavailable(f"the database cannot be read: {error}")


def check_version(version: str) -> None:
    """Refuse an SQLite with the WAL-reset corruption bug. Raises StoreUnavailable."""
    if tuple(map(int, version.split("."))) < _OLDEST_SQLITE:
        raise StoreUnavailable(
            f"SQLite {version} can corrupt a database in WAL mode; 3.51.3 or newer is needed (apsw 3.54 brings it)"
        )


def _get(read: _Execute, table: Table, ids: Sequence[str], cold: Sequence[str]) -> list[Entity | None]:
    sql = f"{table.select_sql} WHERE id = ?"
    with _snapshot(read, cold):
        found: list[Entity | None] = []
        for identifier in ids:
            rows = read(sql, (identifier,)).fetchall()
            found.append(_entity(read, table, rows[0], cold) if rows else None)
        return found


def _find(read: _Execute, table: Table, query: Query, statements: list[queries.Bound], limit: int) -> list[Entity]:
    with _snapshot(read, query.cold):
        found: list[Entity] = []
        for sql, values in statements:
            if len(found) < limit:
                rows = read(sql, (*values, limit - len(found))).fetchall()
                found.extend([_entity(read, table, row, query.cold) for row in rows])
        return found


@contextlib.contextmanager
def _transaction(read: _Execute) -> Iterator[None]:
    read("BEGIN")
    try:
        yield
    finally:
        read("COMMIT")


def _snapshot(read: _Execute, cold: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """Where several statements make an entity, let them see one state."""
    return _transaction(read) if cold else contextlib.nullcontext()


def _entity(read: _Execute, table: Table, row: tuple[Any, ...], cold: Sequence[str]) -> Entity:
    parts: dict[str, bytes] = {}
    for name in cold:
        part, slash, piece = name.partition("/")
        if part not in table.cold_piece_sql:
            raise ValueError(f"kind {table.name} has no cold part {part}")
        if slash:
            for (data,) in read(table.cold_piece_sql[part], (row[0], piece)).fetchall():
                parts[name] = data
        else:
            for piece, data in read(table.cold_all_sql[part], (row[0],)).fetchall():
                parts[f"{part}/{piece}" if piece else part] = data
    return Entity(table.name, row[1], row[2], dict(zip(table.columns, row[4:], strict=True)), row[3], parts)
