"""Ingestion: what a file is comes from its bytes; every record arrives whole, once and in order."""

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.techdeck.ingestion import ingest
from mcp_control.techdeck.ingestion.encoding import Encoding
from mcp_control.techdeck.ingestion.jsonstream import Shape, Splitter
from mcp_control.techdeck.ingestion.records import Limits, Row, read_jsonl
from mcp_control.techdeck.ingestion.streams import Oversize, lines
from mcp_control.techdeck.ingestion.tabular import read_csv
from mcp_control.techdeck.model import RAW_SCHEMA, DataError, IngestOptions, Options
from mcp_control.techdeck.synthetic import generate
from tests.techdeck.stages import MISSING, quiet, real_data, run, run_path

QA = {"question": "q", "answer": "a"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
RUSSIAN = "Мне грустно, и я плохо сплю по ночам. " * 30
JAPANESE = "最近よく眠れません。とても疲れています。" * 40


def dumps(*items: Any) -> bytes:
    """JSON lines."""
    return b"\n".join(json.dumps(item, ensure_ascii=False).encode() for item in items)


CONTAINERS: list[tuple[str, bytes, int]] = [
    ("jsonl", dumps(QA, QA), 2),
    ("jsonl", dumps(QA, QA) + b"\n\n \n", 2),
    ("jsonl", b"{broken\n" + dumps(QA), 1),
    ("jsonl", dumps([{"role": "user", "content": "x"}], [{"role": "user", "content": "y"}]), 2),
    ("jsonl", json.dumps("Human: a\nAssistant: b").encode(), 1),
    ("json_array", json.dumps([QA, QA, QA]).encode(), 3),
    ("json_array", json.dumps([QA, QA], indent=2).encode(), 2),
    ("json_array", b"[\n" + dumps(QA) + b",\n" + dumps(QA) + b"\n]\n", 2),
    ("json_array", json.dumps([["a", "b"], ["c", "d"]]).encode(), 2),
    ("json_object", dumps(QA), 1),
    ("json_object", dumps(CHAT), 1),
    ("json_object", json.dumps(CHAT, indent=4).encode(), 1),
    ("json_object", dumps(["a", "b"]), 1),
    ("json_wrapper", dumps({"data": [QA, QA]}), 2),
    ("json_wrapper", dumps({"version": {"a": [1]}, "conversations": [CHAT, CHAT]}), 2),
    ("json_wrapper", json.dumps({"rows": [QA, QA], "n": 2}, indent=1).encode(), 2),
    ("json_concatenated", dumps(QA) + dumps(QA), 2),
    ("csv", b"question,answer\nq,a\n", 1),
    ("csv", b"question;answer\n1,5;2,5\n", 1),
    ("csv", b"question\tanswer\nq, r\ta\n", 1),
    ("csv", b"question|answer\nq|a", 1),
    ("csv", b"question,answer\rq,a\rr,b\r", 2),
    ("csv", b'text\n"Human: a\nAssistant: b"\n', 1),
    ("csv", b'id,text\n1,"Human: a, b\nAssistant: c"\n', 1),
    ("text", b"User: a, b\nBot: c, d\n", 1),
    ("text", b"<|im_start|>user\na, b<|im_end|>\n<|im_start|>assistant\nc", 1),
]


@pytest.mark.parametrize(("container", "data", "rows"), CONTAINERS)
@pytest.mark.parametrize("packed", [False, True])
def test_containers_are_known_by_their_bytes(
    container: str, data: bytes, rows: int, packed: bool, tmp_path: Path
) -> None:
    """The container is recognised under a misleading name, plain or compressed, and all records come out."""
    outcome = run(gzip.compress(data) if packed else data, tmp_path, "data.pdf")
    assert outcome.ingested.plan.container == container
    assert outcome.ingested.plan.compression == ("gzip" if packed else "none")
    assert len(outcome.conversations) == rows


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_compressed_members_are_one_stream(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """Compressed files put one after another are read to the end, even if a record spans two; zero padding is ignored."""
    data = dumps(QA, QA, QA)
    outcome = run(pack(data[:40]) + pack(data[40:]) + b"\x00" * 16, tmp_path)
    assert len(outcome.conversations) == 3
    assert outcome.ingested.errors == []


def test_many_bad_rows_stay_bounded(tmp_path: Path) -> None:
    """After 10,000 rejected rows only place, reason and digest are kept of further ones; the counts stay exact."""
    outcome = run(dumps(QA) + b"\n" + b"{broken\n" * 10_050 + dumps(QA), tmp_path)
    assert outcome.ingested.rejected_by_code == {"E_JSON": 10_050}
    assert [outcome.quarantine[index]["raw"] for index in (9_999, 10_000)] == ["{broken", ""]
    assert outcome.quarantine[-1]["sha256"] == hashlib.sha256(b"{broken").hexdigest()
    assert len(outcome.conversations) == 2


def test_parquet_rows(tmp_path: Path) -> None:
    """Nested, binary, decimal and time columns of Parquet arrive as JSON; rows keep their order."""
    table = pa.table(
        {
            "messages": [CHAT["messages"], None],
            "when": pa.array([0, None], pa.timestamp("s")),
            "raw": [b"x", None],
            "score": [float("nan"), 1.5],
        }
    )
    pq.write_table(table, tmp_path / "p")
    ingested = ingest(tmp_path / "p", "p", tmp_path / "out", Options(), quiet)
    frame = pl.read_parquet(ingested.partitions[0].path)
    assert frame.schema == RAW_SCHEMA
    assert [json.loads(text) for text in frame["record"]] == [
        {"messages": CHAT["messages"], "when": "1970-01-01T00:00:00", "raw": "x", "score": None},
        {"messages": None, "when": None, "raw": None, "score": 1.5},
    ]
    assert ingested.plan.format == "chatml"


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("utf-16", "Grüße"), ("utf-32", "Grüße"), ("utf-8-sig", "Grüße"), ("cp1251", RUSSIAN), ("shift_jis", JAPANESE)],
)
@pytest.mark.parametrize("container", ["lines", "array", "table"])
def test_encodings_are_detected(encoding: str, text: str, container: str, tmp_path: Path) -> None:
    """Byte order marks and, from enough bytes, code pages are detected for the whole file, without warnings."""
    records = [{"question": text, "answer": f"{text}{number}"} for number in range(3)]
    whole = {
        "lines": "\n".join(json.dumps(record, ensure_ascii=False) for record in records),
        "array": json.dumps(records, ensure_ascii=False),
        "table": "question;answer\n" + "".join(f'"{r["question"]}";"{r["answer"]}"\n' for r in records),
    }[container]
    outcome = run(whole.encode(encoding), tmp_path)
    assert [message["content"] for message in outcome.conversations[2]["messages"]] == [text, f"{text}2"]
    assert outcome.ingested.plan.warnings == []


def test_short_western_text_is_cp1252(tmp_path: Path) -> None:
    """A few bytes that are not UTF-8 are cp1252, whatever a detector would guess."""
    outcome = run("question,answer\n“déjà”,naïve\n".encode("cp1252"), tmp_path)
    assert outcome.turns() == [("user", "“déjà”"), ("assistant", "naïve")]


def test_given_encoding(tmp_path: Path) -> None:
    """A given encoding is used as it is; what it cannot decode goes aside; an unknown one is an error."""
    data = dumps(QA | {"question": "żółć"}).decode().encode("iso8859_2") + b"\n" + dumps(QA)
    assert run(data, tmp_path, encoding="latin2").turns()[0] == ("user", "żółć")
    assert run(data, tmp_path, encoding="ascii").codes() == {"E_ENCODING": 1}
    with pytest.raises(DataError, match="E_ENCODING: the given encoding is not known"):
        run(data, tmp_path, encoding="klingon")


def test_wrapper_lists_keep_their_name(tmp_path: Path) -> None:
    """Every list of a wrapper is read and its key kept."""
    outcome = run(dumps({"train": [QA, QA], "note": "x", "valid": [QA]}), tmp_path)
    assert [item["meta"] for item in outcome.conversations] == [
        '{"source_key":"train"}',
        '{"source_key":"train"}',
        '{"source_key":"valid"}',
    ]


def test_a_broken_element_leaves_the_array_readable(tmp_path: Path) -> None:
    """Within an array, a bad element and a number go aside; an array that is never closed is reported."""
    outcome = run(b'[{"question":"q","answer":"a"},{"question" "x"},7,{"question":"r","answer":"b"}', tmp_path)
    assert outcome.rejected("ingestion") == {1: "E_JSON", 2: "E_JSON"}
    assert [item["source"]["row"] for item in outcome.conversations] == [0, 3]
    assert outcome.ingested.plan.warnings == ["W_UNCLOSED"]


def test_an_open_quote_costs_one_row(tmp_path: Path) -> None:
    """A quote that is never closed loses its own line, not the rest of the table."""
    outcome = run(b'question,answer\nq,a\n"r,b\ns,c\nt,d\n', tmp_path)
    assert outcome.rejected("ingestion") == {1: "E_RAGGED"}
    assert [outcome.turns(index)[0][1] for index in range(3)] == ["q", "s", "t"]


def test_rows_are_where_they_are_said_to_be(tmp_path: Path) -> None:
    """The byte offset of every row points at its record."""
    data = b"\n" + dumps(QA, QA | {"x": "ä"}) + b"\n\n" + dumps(QA | {"y": 1}) + b"\n"
    for item in run(data, tmp_path).conversations:
        record = json.loads(data[item["source"]["byte_offset"] :].split(b"\n")[0])
        assert sorted(record) == sorted(["question", "answer", *json.loads(item["meta"])])


def test_partitions_depend_on_the_records_alone(tmp_path: Path) -> None:
    """Partitions are cut at the same rows whether the file is plain or compressed, and together hold every row."""
    sizes = []
    for compression in ("none", "gzip", "zstd"):
        path = tmp_path / compression
        generate(path, seed=1, n=500, compression=compression)
        options = Options(ingest=IngestOptions(partition_bytes=64 * 1024))
        ingested = ingest(path, "data", tmp_path / f"{compression}.out", options, quiet)
        sizes.append([part.rows for part in ingested.partitions])
        assert sum(sizes[-1]) == ingested.rows_out == ingested.rows_in - ingested.rejected
    assert len(sizes[0]) > 5
    assert sizes[0] == sizes[1] == sizes[2]


def test_quarantine_holds_the_head_and_the_digest(tmp_path: Path) -> None:
    """A rejected row keeps file, place, stage, reason, its first 4 KiB and the digest of all of it."""
    long = b'{"x": ' + b"y" * 9000
    outcome = run(dumps(QA) + b"\n" + long + b"\n" + dumps(QA), tmp_path)
    (row,) = outcome.quarantine
    assert (row["file"], row["row"], row["byte_offset"], row["stage"]) == (
        "input.jsonl",
        1,
        len(dumps(QA)) + 1,
        "ingestion",
    )
    assert row["raw"].encode() == long[:4096]
    assert row["sha256"] == hashlib.sha256(long).hexdigest()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(alphabet='ab"\\{}[],: \né', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='k"[{', max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
CONTAINER_VALUES = st.lists(
    st.lists(JSON, max_size=3) | st.dictionaries(st.text(max_size=3), JSON, max_size=3), max_size=6
)


def pieces(data: bytes, size: int) -> list[bytes]:
    """The data in chunks."""
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("shape", ["array", "wrapper", "concatenated"])
@given(values=CONTAINER_VALUES, size=st.integers(1, 40), indent=st.none() | st.just(1))
def test_the_splitter_finds_every_record(shape: Shape, values: list[Any], size: int, indent: int | None) -> None:
    """However the bytes arrive, the records are those that a whole-file parser sees, at their offsets."""
    if shape == "concatenated":
        text = "\n".join(json.dumps(value, indent=indent, ensure_ascii=False) for value in values)
    else:
        whole = values if shape == "array" else {"a": {"b": [1]}, "n": "[", 'k"': values}
        text = json.dumps(whole, indent=indent, ensure_ascii=False)
    data = text.encode()
    found = list(Splitter(shape, 10**6).split(pieces(data, size)))
    assert [json.loads(raw[2]) for raw in found if not isinstance(raw, Oversize)] == values
    assert all(data[raw[1] :].startswith(raw[2]) for raw in found if not isinstance(raw, Oversize))
    assert all(raw[0] == ('k"' if shape == "wrapper" else None) for raw in found)


@given(data=st.binary(max_size=200).map(lambda raw: raw.replace(b"\x00", b"\n")), size=st.integers(1, 30))
def test_lines_are_the_same_in_any_chunks(data: bytes, size: int) -> None:
    """Lines and offsets do not depend on how the stream is cut, and long lines are reported with their whole digest."""
    whole = list(lines([data], 20))
    assert list(lines(pieces(data, size), 20)) == whole
    texts = data.split(b"\n")
    assert len(whole) == len(texts) - (texts[-1] == b"")
    assert all(item.head == text for item, text in zip(whole, texts, strict=False) if isinstance(item, Oversize))
    assert [isinstance(item, Oversize) for item in whole] == [len(text) > 20 for text in texts][: len(whole)]


@given(
    rows=st.lists(st.lists(st.text(alphabet='a,;"\n é', max_size=5), min_size=2, max_size=2), max_size=6),
    size=st.integers(1, 30),
)
def test_csv_rows_are_those_of_the_csv_module(rows: list[list[str]], size: int) -> None:
    """Fields with quotes, delimiters and newlines come back as they were written."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([["a", "b"], *rows])
    items = list(read_csv(pieces(sink.getvalue().encode(), size), ",", LIMITS, rename=False))
    assert [list(json.loads(item.text).values()) for item in items if isinstance(item, Row)] == rows


LIMITS = Limits(encoding=Encoding(fallback="cp1252", mixed=True), max_record_bytes=10**6)


@given(values=st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), max_size=5), size=st.integers(1, 30))
def test_bad_lines_do_not_change_good_ones(values: list[Any], size: int) -> None:
    """Rows read beside broken neighbours equal the rows read alone: both paths of the reader agree."""
    good = [json.dumps(value, ensure_ascii=False).encode() for value in values]
    mixed = b"".join(line + b"\n{broken\n \xef\xbb\xbf" + line + b"\n" for line in good)
    items = list(read_jsonl(pieces(mixed, size), LIMITS))
    kept = [json.loads(item.text) for item in items if isinstance(item, Row)]
    assert kept == [value for value in values for _ in range(2)]
    assert [item.row for item in items] == list(range(3 * len(values)))


@pytest.mark.parametrize(
    ("name", "format_name", "container", "rows", "blank"),
    [
        ("20200325_counsel_chat.csv", "qa", "csv", {None: 2129}, None),
        ("counselchat-data.csv", "qa", "csv", {None: 1482}, 99),
        ("counsel_chat_250-tokens_full.json", "personachat", "json_wrapper", {"train": 1839, "valid": 173}, 0),
    ],
)
def test_real_files_are_understood_without_a_setting(
    name: str, format_name: str, container: str, rows: dict[str | None, int], blank: int | None, tmp_path: Path
) -> None:
    """Each real set goes through stages 1 and 2 with its known figures and no rejected row."""
    path = real_data() / name
    if not path.exists():
        pytest.skip(MISSING.format(name))
    outcome = run_path(path, tmp_path / "out")
    plan = outcome.ingested.plan
    assert (plan.format, plan.container, plan.encoding) == (format_name, container, "utf-8")
    assert outcome.quarantine == []
    assert outcome.ingested.rows_in == len(outcome.conversations) == sum(rows.values())
    found = [json.loads(item["meta"]).get("source_key") for item in outcome.conversations]
    assert {key: found.count(key) for key in rows} == rows
    if blank is not None:
        assert sum(not item["messages"][0]["content"].strip() for item in outcome.conversations) == blank
    assert {message["role"] for item in outcome.conversations for message in item["messages"]} == {"user", "assistant"}
