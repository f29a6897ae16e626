"""The format plan: what the first 1,000 records are, decided once for the whole file."""

import re
from collections import Counter
from typing import Any

import msgspec
import orjson

from mcp_control.techdeck.formats.mapping import RULES, MappingError, by_mapping, prepare
from mcp_control.techdeck.formats.names import ALIASES, FORMATS, SIGNATURES, shown
from mcp_control.techdeck.formats.recognise import recognise
from mcp_control.techdeck.formats.table import columns_of
from mcp_control.techdeck.model import DataError, IngestOptions

SAMPLE = 1000
_SHARE = 0.9
_SHOWN = 20
_VICUNA = re.compile(r"identity_\d+|.*_\d+")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The format that the sample shows, and the keys seen."""

    format: str
    subformat: str | None
    columns: list[str]


def find_format(texts: list[str], options: IngestOptions) -> Finding:
    """Name the file's format.

    The format of at least 90 % of the recognised records names the file. Raises DataError E_FORMAT_UNKNOWN when there
    is none, and E_AMBIGUOUS_COLUMNS when every record has several candidate columns.
    """
    records = [_prepared(orjson.loads(text)) for text in texts[:SAMPLE]]
    columns = sorted({key for record in records if isinstance(record, dict) for key in record})
    if options.format is not None:
        name = ALIASES.get(options.format, options.format)
        if name not in FORMATS and name != "mixed":
            raise DataError("E_FORMAT_UNKNOWN", f"format {shown(name)} is not one of {', '.join(FORMATS)}, mixed")
        return Finding(format=name, subformat=None, columns=columns)
    if options.mapping:
        records = [orjson.loads(text) for text in texts[:SAMPLE]]
        return Finding(format=_mapped(records, columns, options.mapping), subformat=None, columns=columns)
    counts = Counter(name for name in map(recognise, records) if name is not None)
    name, times = counts.most_common(1)[0] if counts else ("", 0)
    if not counts or times < _SHARE * counts.total():
        raise DataError("E_FORMAT_UNKNOWN", _unknown(columns, counts))
    if name == "qa":
        _refuse_ambiguous([record for record in records if recognise(record) == "qa"])
    return Finding(format=name, subformat=_subformat(name, records), columns=columns)


def _prepared(record: Any) -> Any:
    try:
        return prepare(record)[0]
    except MappingError:
        return record


def _mapped(records: list[Any], columns: list[str], mapping: dict[str, str]) -> str:
    if "conversation" in mapping:
        if any(columns_of(record, mapping) for record in records):
            return "long_table"
    else:
        for record in records:
            try:
                by_mapping(record, mapping)
            except MappingError as error:
                if error.code == "E_FORMAT_UNKNOWN":
                    continue
            return "mapping"
    named = ", ".join(shown(value) for value in mapping.values())
    raise DataError("E_FORMAT_UNKNOWN", f"no record fits the mapping to {named}; {_unknown(columns, Counter())}")


def _unknown(columns: list[str], counts: Counter[str]) -> str:
    keys = ", ".join(shown(name) for name in columns[:_SHOWN]) + (", ..." if len(columns) > _SHOWN else "")
    mixture = "; ".join(f"{name} in {times} records" for name, times in counts.most_common())
    found = f"; no format reaches 90 %: {mixture} (ingest.format=mixed maps each by its own rule)" if counts else ""
    hint = "give ingest.mapping, such as user=COLUMN and assistant=COLUMN, or messages=COLUMN, or text=COLUMN"
    return f"keys {{{keys}}}; known signatures: {{{SIGNATURES}}}{found}; {hint}"


def _refuse_ambiguous(records: list[Any]) -> None:
    fault: MappingError | None = None
    for record in records:
        try:
            RULES["qa"](record)
        except MappingError as error:
            if error.code == "E_AMBIGUOUS_COLUMNS":
                fault = error
                continue
        return
    if fault is not None:
        raise DataError(fault.code, fault.detail)


def _subformat(name: str, records: list[Any]) -> str | None:
    if name != "sharegpt":
        return None
    ids = [record.get("id") for record in records if isinstance(record, dict)]
    named = sum(isinstance(value, str) and _VICUNA.fullmatch(value) is not None for value in ids)
    return "vicuna" if ids and named >= _SHARE * len(ids) else None
