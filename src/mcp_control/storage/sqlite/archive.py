"""The store of a data folder as a whole: read beside a running server, or written anew.

A reader holds one read transaction of the write-ahead log, so it sees one moment and blocks nobody; the log grows until it ends. A new
store is written to a file of its own that takes the old one's place by one rename, so there is always a whole one, old or new.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import apsw
import msgspec

from mcp_control.kernel.changes import Entity, Kind, StoredFact
from mcp_control.kernel.errors import StorageFull, StoreUnavailable
from mcp_control.storage.sqlite import factlog, folder
from mcp_control.storage.sqlite.schema import LAYOUT, Table, migrate

_DATABASE: Final = "store.db"
_INCOMING: Final = "store-incoming.db"
_PAGE_BYTES: Final = 4 << 20
_PAGE_ROWS: Final = 2000
_FACTS: Final = 10_000


class SqliteArchive:
    """An `Archive` over the store in a data folder."""

    def __init__(self, directory: Path, filesystem_of: folder.FilesystemOf = folder.filesystem_of) -> None:
        self._directory = directory
        self._path = directory / _DATABASE
        self._filesystem_of = filesystem_of

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator["SqliteSnapshot"]:
        """See `Archive.snapshot`."""
        if not self._path.exists() or self._path.stat().st_size == 0:
            raise StoreUnavailable(f"there is no store in {self._directory}")
        folder.check_header(self._path)
        with _reading(self._path) as connection:
            yield SqliteSnapshot(connection)

    @asynccontextmanager
    async def loading(self, kinds: Sequence[Kind], *, replace: bool) -> AsyncIterator["SqliteLoading"]:
        """See `Archive.loading`."""
        folder.prepare(self._directory, self._filesystem_of)
        async with self.resting():
            if not replace and self._path.exists() and self._path.stat().st_size:
                raise StoreUnavailable(f"the data folder {self._directory} holds a store already; it was not touched")
            incoming = self._directory / _INCOMING
            _remove(incoming)
            loading: SqliteLoading | None = None
            try:
                loading = SqliteLoading(incoming, self._path, kinds)
                yield loading
            except (apsw.FullError, apsw.IOError) as error:
                raise StorageFull(f"{incoming} cannot be written: {error}") from error
            finally:
                if loading is not None:
                    loading.close()
                _remove(incoming)

    @asynccontextmanager
    async def resting(self) -> AsyncIterator[None]:
        """See `Archive.resting`."""
        lock = folder.lock(self._directory)
        try:
            yield
        finally:
            os.close(lock)


class SqliteSnapshot:
    """A `Snapshot` over one read transaction."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        layout: Any = connection.pragma("user_version")
        if int(layout) > LAYOUT:
            raise StoreUnavailable("the store was written by a newer version; take the program of that version")
        rows: Any = connection.execute("""SELECT value FROM ".meta" WHERE key GLOB 'kind:*' ORDER BY key""").fetchall()
        self.kinds: tuple[Kind, ...] = tuple(msgspec.json.decode(value, type=Kind) for (value,) in rows)
        self.newest_seq = factlog.newest_seq(connection)
        self._tables = {kind.name: Table(kind) for kind in self.kinds}

    async def entities(self, kind: str) -> AsyncIterator[Sequence[Entity]]:
        """See `Snapshot.entities`."""
        table = self._tables[kind]
        page: list[Entity] = []
        size = 0
        for row, identifier, version, hot, *values in self._connection.execute(f"{table.select_sql} ORDER BY id"):
            cold: dict[str, bytes] = {}
            for part, sql in table.cold_all_sql.items():
                for piece, data in self._connection.execute(sql, (row,)):
                    cold[f"{part}/{piece}" if piece else part] = data
            index = {name: value for name, value in zip(table.columns, values, strict=True) if value is not None}
            page.append(Entity(kind, identifier, version, index, hot, cold))
            size += len(hot) + sum(map(len, cold.values()))
            if size >= _PAGE_BYTES or len(page) >= _PAGE_ROWS:
                yield page
                page, size = [], 0
        if page:
            yield page

    async def facts(self, after: int = 0) -> AsyncIterator[Sequence[StoredFact]]:
        """See `Snapshot.facts`."""
        while page := factlog.read(self._connection, after, _FACTS):
            yield page
            after = page[-1].seq


class SqliteLoading:
    """A `Loading` into a file beside the store."""

    def __init__(self, incoming: Path, target: Path, kinds: Sequence[Kind]) -> None:
        self._incoming = incoming
        self._target = target
        self._tables = {kind.name: Table(kind) for kind in kinds}
        os.close(os.open(incoming, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        self._connection = apsw.Connection(str(incoming))
        # Nothing of it counts before `finish`, which syncs.
        for pragma in ("journal_mode=WAL", "synchronous=OFF", "temp_store=MEMORY", "cache_size=-65536"):
            self._connection.execute(f"PRAGMA {pragma}").fetchall()
        migrate(self._connection, kinds)

    async def put(self, kind: str, entities: Sequence[Entity]) -> None:
        """See `Loading.put`."""
        table = self._tables[kind]
        marks = ", ?" * len(table.columns)
        names = "".join(f', "{name}"' for name in table.columns)
        insert = f'INSERT INTO "{table.name}"(id, version, hot{names}) VALUES(?, ?, ?{marks})'
        with self._connection:
            for entity in entities:
                self._drop(table, entity.id)
                values = [entity.index.get(name) for name in table.columns]
                self._connection.execute(insert, (entity.id, entity.version, entity.hot, *values))
                row = self._connection.last_insert_rowid()
                for name, data in entity.cold.items():
                    part, _, piece = name.partition("/")
                    if part in table.cold_write_sql:  # else of a part that is no longer kept
                        self._connection.execute(table.cold_write_sql[part], (row, piece, data))

    async def drop(self, kind: str, ids: Sequence[str]) -> None:
        """See `Loading.drop`."""
        with self._connection:
            for identifier in ids:
                self._drop(self._tables[kind], identifier)

    def _drop(self, table: Table, identifier: str) -> None:
        for row, *_ in self._connection.execute(table.state_sql, (identifier,)).fetchall():
            for sql in table.delete_sql:
                self._connection.execute(sql, (row,))

    async def append(self, facts: Sequence[StoredFact]) -> None:
        """See `Loading.append`."""
        if facts:
            factlog.append(self._connection, facts[0].seq - 1, [stored.fact for stored in facts])

    @asynccontextmanager
    async def loaded(self) -> AsyncIterator[SqliteSnapshot]:
        """See `Loading.loaded`."""
        with _reading(self._incoming) as connection:
            yield SqliteSnapshot(connection)

    async def finish(self, newest_seq: int) -> None:
        """See `Loading.finish`."""
        self._connection.execute("""INSERT OR REPLACE INTO ".meta" VALUES('newest_seq', ?)""", (newest_seq,))
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self.close()  # the last connection removes its log
        _sync(self._incoming)
        _settle_log(self._target)
        self._incoming.rename(self._target)
        _sync(self._target.parent)

    def close(self) -> None:
        """Release the file; calling it twice is a no-op."""
        self._connection.close(True)


@contextmanager
def _reading(path: Path) -> Iterator[apsw.Connection]:
    """Open a database for one read transaction, and change nothing of it at the end."""
    try:
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    except apsw.Error as error:
        raise StoreUnavailable(f"the database {path} cannot be opened: {error}") from error
    try:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 1)
        connection.set_busy_timeout(5000)
        for pragma in ("trusted_schema=OFF", "query_only=ON", "temp_store=MEMORY"):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        connection.wal_autocheckpoint(0)
        connection.execute("BEGIN")
        connection.execute('SELECT count(*) FROM ".meta"').fetchall()  # the transaction begins with the first read
        yield connection
    except apsw.Error as error:
        raise StoreUnavailable(f"the database {path} cannot be read: {error}") from error
    finally:
        connection.close(True)


def _settle_log(path: Path) -> None:
    """Leave no write-ahead log beside a database that is about to be replaced: it would be taken for the new one's."""
    if path.exists():
        with contextlib.suppress(apsw.Error):  # a damaged one is replaced all the same
            connection = apsw.Connection(str(path))
            try:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                connection.close(True)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
