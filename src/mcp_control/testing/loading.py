"""Many rows put straight into a store that no server uses, faster than a server could: for tests beside a million tasks."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Final

import apsw
import pymongo

from mcp_control.kernel.changes import IndexValue, Kind
from mcp_control.storage.sqlite.schema import Table

Row = tuple[str, Mapping[str, IndexValue], bytes]  # id, index fields, hot bytes
_AT_ONCE: Final = 20_000


def load_mongo(database: "pymongo.database.Database[dict[str, Any]]", kind: Kind, rows: Iterable[Row]) -> None:
    """Put rows into the collection of a kind as fast as it goes. Its indexes are built at the end."""
    target = database[kind.name].with_options(write_concern=pymongo.WriteConcern(1, j=False))
    indexes = [{**index} for index in target.list_indexes() if index["name"] != "_id_"]
    target.drop_indexes()
    documents = (
        {"_id": name, "v": 1, "h": hot, "i": {field: value for field, value in index.items() if value is not None}}
        for name, index, hot in rows
    )
    while batch := [*islice(documents, _AT_ONCE)]:
        target.insert_many(batch, ordered=False)
    if indexes:
        database.command("createIndexes", kind.name, indexes=indexes)


def load_sqlite(connection: apsw.Connection, kind: Kind, rows: Iterable[Row]) -> None:
    """Put rows into the table of a kind as fast as it goes. Its indexes are built at the end."""
    connection.execute("PRAGMA synchronous = OFF; PRAGMA cache_size = -200000")
    columns = [field.name for field in kind.fields]
    indexes = connection.execute(
        "SELECT name, sql FROM sqlite_schema WHERE type = 'index' AND tbl_name = ? AND sql IS NOT NULL", (kind.name,)
    ).fetchall()
    with connection:
        for name, _ in indexes:
            connection.execute(f'DROP INDEX "{name}"')
        connection.executemany(
            Table(kind).insert_sql, ((one, hot, *(index.get(name) for name in columns)) for one, index, hot in rows)
        )
        for _, sql in indexes:
            connection.execute(str(sql))
