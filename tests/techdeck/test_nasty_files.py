"""Files that break other readers: each has one exact answer, and a bad row never takes its neighbours with it."""

import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcp_control.techdeck.ingestion import ingest
from mcp_control.techdeck.model import DataError, IngestOptions, Options
from tests.techdeck.stages import quiet, run, run_path

GOOD = b'{"question":"q","answer":"a"}'
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + b"\x00" * 64


def qa(question: str) -> bytes:
    """One JSON line."""
    return json.dumps({"question": question, "answer": "a"}, ensure_ascii=False).encode()


def test_1_mixed_encodings(tmp_path: Path) -> None:
    """A cp1252 line among UTF-8 lines is decoded as such with a warning."""
    data = qa("café ü") + b"\n" + '{"question":"naïve – “x”","answer":"a"}'.encode("cp1252")
    outcome = run(data, tmp_path)
    assert [outcome.turns(0)[0][1], outcome.turns(1)[0][1]] == ["café ü", "naïve – “x”"]
    assert [item["flags"] for item in outcome.conversations] == [[], ["W_ENCODING_MIXED"]]
    assert [item["source"]["encoding"] for item in outcome.conversations] == ["utf-8", "cp1252"]
    assert outcome.ingested.plan.warnings == ["W_ENCODING_MIXED"]


def test_1_mixed_encodings_strict(tmp_path: Path) -> None:
    """In strict mode the same line is set aside, naming byte, offset and encoding."""
    outcome = run(GOOD + b"\n" + qa("é").decode().encode("cp1252"), tmp_path, strict_encoding=True)
    (row,) = outcome.quarantine
    assert (row["row"], row["code"], row["message"]) == (1, "E_ENCODING", "row 1: byte 0xe9 at offset 44 is not utf-8")
    assert len(outcome.conversations) == 1


def test_2_byte_order_mark(tmp_path: Path) -> None:
    """A byte order mark is removed; no row is lost, in JSON lines and in CSV."""
    outcome = run(b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD, tmp_path)
    assert [item["source"]["byte_offset"] for item in outcome.conversations] == [3, 33]
    table = run(b"\xef\xbb\xbfquestion,answer\nq,a\n", tmp_path, "t.csv")
    assert table.ingested.plan.columns == ["answer", "question"]


def test_3_line_ends_within_quotes(tmp_path: Path) -> None:
    """CR LF inside CSV quotes stays in its row and becomes LF."""
    outcome = run(b'question,answer\r\n"line1\r\nline2",a\r\n', tmp_path, "t.csv")
    assert [outcome.turns(index) for index in range(len(outcome.conversations))] == [
        [("user", "line1\nline2"), ("assistant", "a")]
    ]


def test_4_ragged_rows(tmp_path: Path) -> None:
    """Rows with too few or too many fields go aside; nothing is cut or padded."""
    outcome = run(b"question,answer\n1,2\n3\n4,5,6\n7,8\n", tmp_path, "t.csv")
    assert [outcome.turns(0)[0][1], outcome.turns(1)[0][1]] == ["1", "7"]
    assert [(row["row"], row["code"], row["message"], row["raw"]) for row in outcome.quarantine] == [
        (1, "E_RAGGED", "row 1: 1 fields, header has 2", "3"),
        (2, "E_RAGGED", "row 2: 3 fields, header has 2", "4,5,6"),
    ]


@pytest.mark.parametrize("pretty", [False, True])
def test_5_concatenated_values(pretty: bool, tmp_path: Path) -> None:
    """JSON values one after another are as many records, on one line or over many."""
    good = json.dumps(json.loads(GOOD), indent=1).encode() if pretty else GOOD
    outcome = run(good + good + b"\n" + good, tmp_path)
    assert outcome.ingested.rows_out == len(outcome.conversations) == 3
    assert "W_CONCATENATED" in outcome.ingested.plan.warnings
    assert outcome.conversations[1]["source"]["byte_offset"] == len(good)


def test_6_nan(tmp_path: Path) -> None:
    """NaN is no JSON: its row goes aside and the next is kept; on demand it is read as null."""
    data = b'{"question":"q","answer":"a","score":NaN}\n' + GOOD
    outcome = run(data, tmp_path)
    assert outcome.rejected("ingestion") == {0: "E_JSON"}
    assert outcome.quarantine[0]["message"].startswith("row 0, column 38: ")
    assert [item["source"]["row"] for item in outcome.conversations] == [1]
    assert run(data, tmp_path, nan_as_null=True).conversations[0]["meta"] == '{"score":null}'


@pytest.mark.parametrize("shape", ["lines", "array", "table"])
def test_7_huge_rows(shape: str, tmp_path: Path) -> None:
    """A record over the limit is skipped to its end in bounded memory, and the rest is read."""
    size, limit = 24 * 1024 * 1024, 1024 * 1024
    path = tmp_path / "huge"
    start, between, end = {
        "lines": (b"", b"\n", b"\n"),
        "array": (b"[", b",", b"]"),
        "table": (b"question,answer\n", b"\n", b"\n"),
    }[shape]
    before, after = (b'{"question":"', b'","answer":"a"}') if shape != "table" else (b'"', b'",a')
    with path.open("wb") as file:
        file.write(start + before + b"q" + after + between + before)
        for _ in range(size // 4096):
            file.write(b"x" * 4096)
        file.write(after + between + before + b"r" + after + end)
    options = Options(ingest=IngestOptions(max_record_bytes=limit))
    tracemalloc.start()
    ingested = ingest(path, "huge", tmp_path / "measured", options, quiet)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 1024 * 1024
    assert (ingested.rows_in, ingested.rejected_by_code) == (3, {"E_ROW_TOO_LARGE": 1})
    outcome = run_path(path, tmp_path / "out", options)
    assert outcome.quarantine[0]["message"] == f"row 1: over the limit of {limit} bytes"
    assert len(outcome.quarantine[0]["raw"]) == 4096
    assert [outcome.turns(0)[0][1], outcome.turns(1)[0][1]] == ["q", "r"]


@pytest.mark.parametrize(
    ("data", "code", "detail"),
    [
        (b"", "E_EMPTY", "file is empty (0 bytes)"),
        (b" \n\n", "E_EMPTY", "file is empty (only white space)"),
        (b"[]", "E_EMPTY", "file holds no records"),
        (b"question,answer\n", "E_EMPTY", "file holds no records"),
        (gzip.compress(b"", mtime=0), "E_EMPTY", "compressed stream holds no data"),
        (PNG, "E_BINARY", "content looks like PNG, not csv"),
        (gzip.compress(PNG, mtime=0), "E_BINARY", "content looks like PNG, not csv"),
        (
            gzip.compress(gzip.compress(GOOD, mtime=0), mtime=0),
            "E_BINARY",
            "content looks like gzip within compression, not csv",
        ),
        (b"a,b\x00\n1,2\n", "E_BINARY", "content looks like binary data, not csv"),
        (b"PAR1" + b"x" * 50, "E_TRUNCATED", "Parquet file without its end; no records can be read"),
        (b"PAR1" + b"x" * 50 + b"PAR1", "E_PARQUET", "not readable as Parquet after row 0: ArrowInvalid"),
        (b'{"question": "q", "answer": ', "E_JSON", "row 0, column 29: unexpected end of data"),
    ],
)
def test_8_no_text(data: bytes, code: str, detail: str, tmp_path: Path) -> None:
    """An empty, binary or hopeless file ends in one permanent error, whatever its name says."""
    with pytest.raises(DataError) as caught:
        run(data, tmp_path, "data.csv")
    assert (caught.value.code, caught.value.detail) == (code, detail)


@pytest.mark.parametrize("shape", ["lines", "array", "table"])
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_9_cut_compressed_stream(compression: str, shape: str, tmp_path: Path) -> None:
    """Half a compressed file: complete rows are kept, the error names bytes and rows, and no piece of a row passes."""
    rows = [f"{number * 7919 % 10007}-" * 9 for number in range(30_000)]
    if shape == "table":
        data = "question,answer\n" + "".join(f'"{row}\n{row}",{row}\n' for row in rows)
    else:
        items = [json.dumps({"question": row, "answer": row}) for row in rows]
        data = "\n".join(items) + "\n" if shape == "lines" else "[" + ",\n".join(items) + "]"
    packed = gzip.compress(data.encode()) if compression == "gzip" else zstandard.compress(data.encode())
    outcome = run(packed[: len(packed) // 2], tmp_path)
    kept = len(outcome.conversations)
    assert 1000 < kept < 30_000
    assert outcome.quarantine == []
    assert all(item["messages"][1]["content"] == row for item, row in zip(outcome.conversations, rows, strict=False))
    (error,) = outcome.ingested.errors
    assert error.code == "E_TRUNCATED"
    assert error.detail.startswith("compressed stream ended after ")
    assert error.detail.endswith(f" bytes; {kept} complete records kept")


def test_9_corrupt_stream(tmp_path: Path) -> None:
    """Bytes changed in the middle of a compressed file are reported, and what came before is kept."""
    packed = bytearray(gzip.compress(b"\n".join(qa(f"{number * 7919 % 10007}" * 9) for number in range(30_000))))
    packed[len(packed) // 2 : len(packed) // 2 + 40] = b"\xff" * 40
    outcome = run(bytes(packed), tmp_path)
    assert outcome.ingested.errors[0].code == "E_CORRUPT"
    assert len(outcome.conversations) > 1000


def test_10_duplicate_header(tmp_path: Path) -> None:
    """A repeated column ends the file, unless a mapping says which columns count."""
    data = b"text,text,a\n1,2,3\n"
    with pytest.raises(DataError, match="E_DUP_HEADER: column text appears 2 times"):
        run(data, tmp_path, "t.csv")
    outcome = run(data, tmp_path, "t.csv", mapping={"user": "text", "assistant": "a"})
    assert outcome.turns() == [("user", "1"), ("assistant", "3")]
    assert outcome.conversations[0]["meta"] == '{"text_2":"2"}'


def test_duplicate_json_key_keeps_the_last(tmp_path: Path) -> None:
    """Of two equal keys the last counts."""
    assert run(b'{"question":"q","answer":"a","answer":"b"}', tmp_path).turns()[1] == ("assistant", "b")


def test_lone_surrogate_is_set_aside(tmp_path: Path) -> None:
    """Half a surrogate pair can never be written as UTF-8: the row goes aside."""
    outcome = run(GOOD + b'\n{"question":"\\ud800","answer":"a"}\n' + GOOD, tmp_path)
    assert outcome.rejected("ingestion") == {1: "E_JSON"}
    assert len(outcome.conversations) == 2


@pytest.mark.parametrize("depth", [2_000, 200_000])
def test_deep_nesting_is_set_aside(depth: int, tmp_path: Path) -> None:
    """A row nested beyond reason goes aside; it neither crashes the reader nor stops the rest."""
    deep = b'{"question":"q","answer":"a","x":' + b"[" * depth + b"]" * depth + b"}"
    outcome = run(GOOD + b"\n" + deep + b"\n" + GOOD, tmp_path)
    assert outcome.codes() == {"E_JSON": 1}
    assert len(outcome.conversations) == 2


def test_late_keys_and_mixed_types_survive(tmp_path: Path) -> None:
    """A key first seen after thousands of rows is kept, and a field of many types keeps each as it is."""
    rows = [{"question": "q", "answer": "a", "v": 1}] * 2500 + [{"question": "q", "answer": "a", "v": "1", "late": [1]}]
    outcome = run("\n".join(json.dumps(row) for row in rows).encode(), tmp_path)
    assert [outcome.conversations[index]["meta"] for index in (0, -1)] == ['{"v":1}', '{"late":[1],"v":"1"}']


def test_decompression_bomb(tmp_path: Path) -> None:
    """A stream that swells beyond the allowed ratio is refused."""
    with pytest.raises(DataError) as caught:
        run(gzip.compress(b" " * 40_000_000), tmp_path)
    assert caught.value.code == "E_RATIO"


def test_undecodable_text_in_parquet_costs_its_row(tmp_path: Path) -> None:
    """A Parquet string that is not UTF-8 goes aside alone."""
    bad = pa.array([b"q", b"\xff", b"r"]).view(pa.string())
    pq.write_table(pa.table({"question": bad, "answer": ["a", "b", "c"]}), tmp_path / "p")
    outcome = run_path(tmp_path / "p", tmp_path / "out")
    assert outcome.rejected("ingestion") == {1: "E_ENCODING"}
    assert [outcome.turns(0)[0][1], outcome.turns(1)[0][1]] == ["q", "r"]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file of some container with bytes changed, lost, repeated or inserted."""
    data = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        end = place + draw(st.integers(0, 40))
        data[place:end] = draw(
            st.sampled_from([b"", b'"', b"\n", b"[", b"}", b"\xff", b"\x00", b"PAR1", bytes(data[place:end]) * 2])
        )
    return bytes(data)


def _parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"question": ["q"] * 9, "answer": ["a"] * 9}), sink)
    return sink.getvalue()


LINES = b"\n".join([GOOD] * 9)
WHOLE = [
    LINES,
    b"[" + b",".join([GOOD] * 9) + b"]",
    b'{"train":[' + b",".join([GOOD] * 9) + b"]}",
    b"question,answer\n" + b'"q",a\n' * 9,
    b"Human: a\nAssistant: b",
    gzip.compress(LINES, mtime=0),
    zstandard.compress(LINES),
    _parquet(),
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=damaged())
def test_damage_ends_in_rows_or_one_error(data: bytes, tmp_path: Path) -> None:
    """Whatever happened to a file, it gives counted rows or one DataError, never another exception."""
    try:
        outcome = run(data, tmp_path)
    except DataError:
        return
    assert outcome.ingested.rows_in == outcome.ingested.rows_out + outcome.ingested.rejected
    aside = len(outcome.rejected("standardization"))
    assert outcome.ingested.rows_out == len(outcome.conversations) + outcome.merged + aside


def test_messages_never_quote_content(tmp_path: Path) -> None:
    """Reasons name places and types; a role or column that may be text is only measured."""
    secret = "my secret: call 555, please do not tell anyone about it"
    bad = [
        json.dumps({"messages": [{"role": secret, "content": "x"}]}),
        json.dumps({"messages": [{"role": "user", "content": {"x": secret}}]}),
        '{"messages": "' + secret,
        json.dumps({"n": secret}),
    ]
    good = json.dumps({"messages": [{"role": "user", "content": "x"}]})
    outcome = run("\n".join([good, *bad]).encode(), tmp_path)
    assert len(outcome.quarantine) == 4
    assert not any("secret" in row["message"] for row in outcome.quarantine)
    with pytest.raises(DataError) as caught:
        run(json.dumps({secret: 1}).encode(), tmp_path)
    assert "secret" not in caught.value.detail
