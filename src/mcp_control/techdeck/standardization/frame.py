"""Conversations collected in columns: far cheaper than one object per conversation."""

from typing import Any

import polars as pl
import pyarrow as pa

from mcp_control.techdeck.formats.mapping import Message
from mcp_control.techdeck.model import CONVERSATION_SCHEMA, SCHEMA_VERSION, TEXT_LIST, Plan, arrow_series, series_of

_MESSAGE = ("role", "content", "name", "ts")

_LABELS = pa.large_list(pa.struct([("key", pa.large_string()), ("value", pa.large_string())]))
Source = tuple[int, int | None, str, str, float]
"""Row, byte offset, format, encoding and role confidence."""


class Columns:
    """Appends conversations and gives them back as one frame of `CONVERSATION_SCHEMA`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._ids: list[str] = []
        self._offsets: list[int] = [0]
        self._messages: list[Message] = []
        self._sources: list[Source] = []
        self._meta: list[str] = []
        self._labels: list[list[dict[str, str]]] = []
        self._flags: list[list[str]] = []

    def __len__(self) -> int:
        return len(self._ids)

    def add(
        self,
        identifier: str,
        messages: list[Message],
        source: Source,
        meta: str,
        labels: list[dict[str, str]],
        flags: list[str],
    ) -> None:
        """Take one conversation."""
        self._ids.append(identifier)
        self._messages.extend(messages)
        self._offsets.append(len(self._messages))
        self._sources.append(source)
        self._meta.append(meta)
        self._labels.append(labels)
        self._flags.append(flags)

    def frame(self) -> pl.DataFrame:
        """All conversations taken so far."""
        size = len(self._ids)
        columns: list[Any] = list(zip(*self._sources, strict=True)) or [()] * 5
        source = pl.DataFrame(
            {
                "file": [self._plan.file] * size,
                "sha256": [self._plan.sha256] * size,
                "row": columns[0],
                "byte_offset": columns[1],
                "format": columns[2],
                "encoding": columns[3],
                "role_confidence": columns[4],
            },
            schema={field.name: field.dtype for field in _fields("source")},
        ).to_struct("source")
        return pl.DataFrame(
            [
                pl.Series("id", self._ids, dtype=pl.String()),
                self._message_lists(),
                source,
                pl.Series("meta", self._meta, dtype=pl.String()),
                series_of("labels", self._labels, _LABELS),
                series_of("flags", self._flags, TEXT_LIST),
                pl.Series("schema_version", [SCHEMA_VERSION] * size, dtype=pl.Int32()),
            ]
        )

    def _message_lists(self) -> pl.Series:
        columns: list[Any] = list(zip(*self._messages, strict=True)) or [(), (), (), ()]
        arrays = [pa.array(column, pa.large_string()) for column in columns]
        structs = pa.StructArray.from_arrays(arrays, names=list(_MESSAGE))
        lists = pa.LargeListArray.from_arrays(pa.array(self._offsets, pa.int64()), structs)
        return arrow_series("messages", lists)


def _fields(column: str) -> list[pl.Field]:
    dtype = CONVERSATION_SCHEMA[column]
    return dtype.fields if isinstance(dtype, pl.Struct) else []
