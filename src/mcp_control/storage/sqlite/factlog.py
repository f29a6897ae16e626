"""The facts of each physical commit as one row, so that a fact costs a few bytes and not a row with its index entries."""

from collections.abc import Sequence
from typing import Any

import apsw
import msgspec

from mcp_control.kernel.changes import Fact, StoredFact

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Fact]).decode


def newest_seq(connection: apsw.Connection) -> int:
    """Return the largest `seq` ever given, 0 when there was none; it outlives the facts themselves."""
    rows: Any = connection.execute(
        """SELECT max((SELECT ifnull(max(last_seq), 0) FROM ".facts"), ifnull((SELECT value FROM ".meta" WHERE key = 'newest_seq'), 0))"""
    ).fetchall()
    return int(rows[0][0])


def append(connection: apsw.Connection, newest: int, facts: Sequence[Fact]) -> list[StoredFact]:
    """Write the facts of a commit as those after `newest`, and return them with their places."""
    stored = [StoredFact(seq, fact) for seq, fact in enumerate(facts, newest + 1)]
    connection.execute(
        'INSERT INTO ".facts" VALUES(?, ?, ?, ?)',
        (stored[-1].seq, newest + 1, max(fact.at for fact in facts), _encode(facts)),
    )
    return stored


def read(connection: apsw.Connection, after: int, limit: int) -> list[StoredFact]:
    """Return the facts with `seq > after`, in order, at most `limit`."""
    found: list[StoredFact] = []
    cursor = connection.execute('SELECT first_seq, data FROM ".facts" WHERE last_seq > ? ORDER BY last_seq', (after,))
    try:
        for first, data in cursor:
            for seq, fact in enumerate(_decode(data), first):
                if seq > after:
                    found.append(StoredFact(seq, fact))
                    if len(found) >= limit:
                        return found
        return found
    finally:
        cursor.close(True)  # an unfinished read would keep the log from being checkpointed


def trim(connection: apsw.Connection, newest: int, before_at: int, keep: int, limit: int) -> int:
    """Delete the oldest rows that hold nothing to keep, about `limit` facts; return the oldest `seq` left, or what would be next."""
    deleted, last = 0, 0
    cursor = connection.execute('SELECT last_seq, first_seq, newest_at FROM ".facts" ORDER BY last_seq')
    for last_seq, first_seq, newest_at in cursor:
        if deleted >= limit or not (newest_at < before_at or last_seq <= newest - keep):
            break
        deleted += last_seq - first_seq + 1
        last = last_seq
    cursor.close(True)
    if deleted:
        connection.execute("""INSERT OR REPLACE INTO ".meta" VALUES('newest_seq', ?)""", (newest,))
        connection.execute('DELETE FROM ".facts" WHERE last_seq <= ?', (last,))
    oldest: Any = connection.execute('SELECT first_seq FROM ".facts" ORDER BY last_seq LIMIT 1').fetchall()
    if oldest:
        return int(oldest[0][0])
    return newest + 1 if newest else 0
