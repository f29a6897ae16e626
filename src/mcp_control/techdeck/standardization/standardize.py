"""Stage 2: raw records to canonical conversations, one partition at a time."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import polars as pl

from mcp_control.techdeck.formats import mapping, table
from mcp_control.techdeck.formats.mapping import RULES, Mapped, MappingError, Message
from mcp_control.techdeck.formats.names import ALIASES
from mcp_control.techdeck.formats.recognise import matches, recognise
from mcp_control.techdeck.ingestion.records import named_id
from mcp_control.techdeck.model import (
    Options,
    Plan,
    Progress,
    Reject,
    Standardized,
    canonical_json,
    quarantine_frame,
    reject,
    write_parquet,
)
from mcp_control.techdeck.standardization.frame import Columns

_STEP = 10_000
_KEPT_FLAG = "W_STARTS_ASSISTANT"


class _Raw(NamedTuple):
    row: int
    byte_offset: int | None
    encoding: str
    key: str | None
    flags: list[str]
    record: str


def standardize(part: Path, plan: Plan, out: Path, options: Options, progress: Progress) -> Standardized:
    """Map every record of the raw partition `part`; write conversations and quarantine under the folder `out`.

    Each record is mapped by its own rule (`plan.format` names the file's, and decides alone when the caller forced it
    or gave a mapping). A record that no rule fits goes to quarantine. Blank content is left for validation.
    """
    out.mkdir(parents=True, exist_ok=True)
    work = _Standardization(plan, options)
    raws = [_Raw(*values) for values in pl.read_parquet(part).iter_rows()]
    if plan.format == "long_table":
        work.table(raws)
    else:
        for done, raw in enumerate(raws, 1):
            work.record(raw)
            if done % _STEP == 0:
                progress(done, len(raws), "mapping")
    progress(len(raws), len(raws), "mapped")
    return work.finish(out, len(raws))


class _Standardization:
    def __init__(self, plan: Plan, options: Options) -> None:
        self._plan = plan
        given = options.ingest.format
        self._forced = ALIASES.get(given, given) if given not in (None, "mixed") else None
        self._columns = Columns(plan)
        self._rejects: list[Reject] = []
        self._formats: Counter[str] = Counter()
        self._warnings: Counter[str] = Counter()
        self._merged = 0

    def record(self, raw: _Raw) -> None:
        """Map one record that is a conversation by itself."""
        record: Any = orjson.loads(raw.record)
        try:
            extra: tuple[str, ...] = ()
            if not self._plan.mapping:
                record, extra = mapping.prepare(record)
            name, mapped = self._map(record)
            if not mapped.messages:
                raise MappingError("E_NO_MESSAGES", "no messages")
            identifier, id_key = self._identify(record, raw, mapped.messages)
            meta = self._meta(record, raw, mapped, id_key)
        except MappingError as error:
            self._reject(raw, error.code, error.text(raw.row))
            return
        labels = _labels(record)
        self._add(identifier, raw, name, mapped, meta, labels, (*raw.flags, *extra, *mapped.flags))

    def _map(self, record: Any) -> tuple[str, Mapped]:
        if self._plan.mapping:
            return "mapping", mapping.by_mapping(record, self._plan.mapping)
        name = recognise(record) if self._forced is None else self._forced
        if name is None or (self._forced is not None and not matches(name, record)):
            raise MappingError("E_FORMAT_UNKNOWN", "no known signature")
        if name not in RULES:
            raise MappingError("E_FORMAT_UNKNOWN", f"a {name} record among {self._plan.format} records")
        return name, RULES[name](record)

    def _identify(self, record: Any, raw: _Raw, messages: list[Message]) -> tuple[str, str | None]:
        """The conversation's id and the field it came from. A repeated source id gets the row number added."""
        found = named_id(record, self._plan.mapping.get("id"))
        if found is None:
            return _digest(messages), None
        field, text = found
        if "W_DUPLICATE_ID" in raw.flags:
            return f"{text}-{raw.row}", None
        return text, None if "question" in field else field

    def _meta(self, record: Any, raw: _Raw, mapped: Mapped, id_key: str | None) -> str:
        rest: dict[str, Any] = {}
        if isinstance(record, dict):
            used = mapped.used
            rest = {key: value for key, value in record.items() if key not in used and key != id_key}
            if _labels(record):
                del rest["labels"]
        if raw.key is not None:
            rest["source_key"] = raw.key
        if mapped.meta:
            rest.update(mapped.meta)
        if not rest:
            return "{}"
        try:
            return canonical_json(rest)
        except TypeError:
            raise MappingError("E_JSON", "nested too deeply") from None

    def table(self, raws: list[_Raw]) -> None:
        """Group the rows of a long table; a fault in one turn sets its conversation aside under that row."""
        groups: dict[str, list[tuple[_Raw, dict[str, Any]]]] = {}
        for raw in raws:
            record = orjson.loads(raw.record)
            name = table.conversation_of(record, self._plan.mapping)
            if name is None:
                self._reject(raw, "E_FORMAT_UNKNOWN", f"row {raw.row}: no conversation, role and text columns")
            else:
                groups.setdefault(name, []).append((raw, record))
        for name, group in groups.items():
            self._merged += len(group) - 1
            try:
                mapped = table.map_group([(raw.row, record) for raw, record in group], self._plan.mapping)
                meta = canonical_json(dict(mapped.meta))
            except MappingError as error:
                raw = group[error.message or 0][0]
                self._reject(raw, error.code, error.text(raw.row))
                continue
            flags = {flag for raw, _ in group for flag in raw.flags if flag != "W_DUPLICATE_ID"}
            self._add(name, group[0][0], "long_table", mapped, meta, [], (*sorted(flags), *mapped.flags))

    def _add(
        self,
        identifier: str,
        raw: _Raw,
        name: str,
        mapped: Mapped,
        meta: str,
        labels: list[dict[str, str]],
        flags: tuple[str, ...],
    ) -> None:
        first = next((message for message in mapped.messages if message[0] != "system"), None)
        if first is not None and first[0] == "assistant":
            flags = (*flags, _KEPT_FLAG)
        if flags:
            self._warnings.update(flags)
        self._formats[name] += 1
        source = (raw.row, raw.byte_offset, name, raw.encoding, mapped.confidence)
        self._columns.add(identifier, mapped.messages, source, meta, labels, list(flags))

    def _reject(self, raw: _Raw, code: str, message: str) -> None:
        self._rejects.append(reject(raw.row, raw.byte_offset, code, message, raw.record.encode()))

    def finish(self, out: Path, rows: int) -> Standardized:
        """Write both files and count."""
        conversations = out / "conversations.parquet" if len(self._columns) else None
        if conversations is not None:
            write_parquet(self._columns.frame(), conversations)
        quarantine = out / "quarantine.parquet" if self._rejects else None
        if quarantine is not None:
            write_parquet(quarantine_frame(self._plan.file, "standardization", self._rejects), quarantine)
        return Standardized(
            conversations=conversations,
            quarantine=quarantine,
            rows_in=rows,
            rows_out=len(self._columns),
            rejected=len(self._rejects),
            rows_merged=self._merged,
            rejected_by_code=dict(sorted(Counter(item.code for item in self._rejects).items())),
            by_format=dict(sorted(self._formats.items())),
            warnings_by_code=dict(sorted(self._warnings.items())),
        )


def _digest(messages: list[Message]) -> str:
    """blake2b-128 of the canonical messages, so equal conversations get equal ids."""
    return hashlib.blake2b(orjson.dumps(messages), digest_size=16).hexdigest()


def _labels(record: Any) -> list[dict[str, str]]:
    """The record's `labels`, if they are a plain map of names to scalars."""
    labels = record.get("labels") if isinstance(record, dict) else None
    if not isinstance(labels, dict) or not labels:
        return []
    if not all(isinstance(value, str | int | float) for value in labels.values()):
        return []
    return [{"key": key, "value": str(value)} for key, value in sorted(labels.items())]
