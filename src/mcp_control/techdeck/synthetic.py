"""Synthetic conversations with known faults: the measure of every stage.

`generate` writes a data set and returns the `Truth` about it: what must be rejected where and why, which personal data
was planted, which rows repeat. The text is template text; real text compresses, repeats and reads differently.
Equal arguments give equal bytes.
"""

import csv
import gzip
import io
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import msgspec
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from mcp_control.techdeck.synthetic_text import ASSISTANT, USER, sentence

Shape = Literal["messages", "alpaca", "sharegpt", "qa", "transcript"]
Container = Literal["jsonl", "json", "csv", "parquet"]
Compression = Literal["none", "gzip", "zstd"]
Turn = tuple[str, str]

_POOL = 6000
_SENTENCES = 5
_LEAD = "The recording starts late and the first minutes are hard to follow. " * 9

_CRISIS = "A friend told me to call 988 or 1-800-273-8255 when it gets bad."
_GIVEN = ("Nora", "Elias", "Priya", "Tomas", "Amina", "Jonas", "Mei", "Carlos")
_FAMILY = ("Lindqvist", "Okafor", "Moreau", "Takahashi", "Novak", "Brennan", "Castillo", "Haddad")
_STREETS = ("Maple Street", "Oak Avenue", "Chestnut Road", "Harbour Lane")
_CARDS = ("4111 1111 1111 1111", "5500 0000 0000 0004", "4012 8888 8888 1881")
_IBANS = ("GB82 WEST 1234 5698 7654 32", "DE89 3704 0044 0532 0130 00", "FR14 2004 1010 0505 0001 3M02 606")
_LATIN = "I met her at the café and cried."


class Planted(msgspec.Struct, frozen=True, kw_only=True):
    """Personal data put into one message of a row; `kind` is its class, `value` its text."""

    row: int
    message: int
    kind: str
    value: str


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """A row that must be set aside, and by which stage with which code."""

    row: int
    stage: str
    code: str


class Truth(msgspec.Struct, frozen=True, kw_only=True):
    """What is true of a generated file.

    `exact` and `near` pair a copy's row with its original's. `same_role` are rows with one pair of neighbours of the
    same role, `crisis` rows naming crisis lines (no personal data), `departing` rows not in UTF-8.
    """

    rows: int
    rejects: list[Rejected]
    pii: list[Planted]
    exact: list[tuple[int, int]]
    near: list[tuple[int, int]]
    same_role: list[int]
    crisis: list[int]
    departing: list[int]

    def rejected_by_code(self, stage: str) -> dict[str, int]:
        """Rows per code that `stage` must set aside."""
        return dict(sorted(Counter(item.code for item in self.rejects if item.stage == stage).items()))

    def rejected_rows(self, stage: str) -> dict[int, str]:
        """Code by row for `stage`."""
        return {item.row: item.code for item in self.rejects if item.stage == stage}

    def accepted(self, *stages: str) -> int:
        """Rows left after `stages`."""
        return self.rows - sum(item.stage in stages for item in self.rejects)


class _Fault(msgspec.Struct, frozen=True):
    kind: str
    stage: str
    code: str


def _faults(shape: Shape, container: Container) -> list[_Fault]:
    """The faults that this shape can have in this container."""
    faults = [_Fault("blank", "validation", "E_EMPTY_CONTENT")]
    if container in ("jsonl", "json"):
        faults += [_Fault("nan", "ingestion", "E_JSON"), _Fault("unknown", "standardization", "E_FORMAT_UNKNOWN")]
    if container == "jsonl":
        faults += [_Fault("cut", "ingestion", "E_JSON"), _Fault("latin", "", "")]
    elif container == "json":
        faults += [_Fault("broken", "ingestion", "E_JSON")]
    elif container == "csv":
        faults += [_Fault("longer", "ingestion", "E_RAGGED"), _Fault("shorter", "ingestion", "E_RAGGED")]
    if shape in ("messages", "sharegpt"):
        faults += [
            _Fault("role", "standardization", "E_ROLE"),
            _Fault("none", "standardization", "E_NO_MESSAGES"),
            _Fault("twice", "", ""),
        ]
    if shape == "transcript":
        faults += [
            _Fault("lead", "standardization", "E_LEADING_TEXT"),
            _Fault("plain", "standardization", "E_FORMAT_UNKNOWN"),
        ]
    elif container in ("jsonl", "json") or (container == "csv" and shape in ("messages", "sharegpt")):
        faults.append(_Fault("type", "standardization", "E_CONTENT_TYPE"))
    return faults


def generate(
    path: Path,
    *,
    seed: int,
    n: int,
    shape: Shape = "messages",
    container: Container = "jsonl",
    compression: Compression = "none",
) -> Truth:
    """Write `n` rows (at least 60) to `path` and return the truth about them.

    Each fault that the shape and container permit hits 0.5 % of the rows (at least one); 3 % are exact and 3 % near
    copies of an earlier row, 4 % hold personal data, 1 % name crisis lines.
    """
    if n < 60:
        raise ValueError("n must be at least 60, so that every fault has a row")
    maker = _Maker(random.Random(seed), n, shape, container)  # reproducible data, not a secret
    with path.open("wb") as file:
        if container == "parquet":
            _compress_bytes(file, compression, _parquet(maker))
        else:
            with _compressor(file, compression) as sink:
                _write_text(sink, maker, container)
    return maker.truth()


class _Maker:
    """Plans the rows, then makes them one by one in order."""

    def __init__(self, rng: random.Random, n: int, shape: Shape, container: Container) -> None:
        self._rng = rng
        self._n = n
        self.shape = shape
        self._container = container
        self._users = [sentence(rng, USER) for _ in range(_POOL)]
        self._assistants = [sentence(rng, ASSISTANT) for _ in range(_POOL)]
        free = rng.sample(range(1, n), n - 1)
        self._fault: dict[int, _Fault] = {}
        for fault in _faults(shape, container):
            for _ in range(max(1, n // 200)):
                self._fault[free.pop()] = fault
        self._personal = {free.pop() for _ in range(max(1, n * 4 // 100))}
        self._crisis = {free.pop() for _ in range(max(1, n // 100))}
        copies = max(1, n * 3 // 100)
        self._copies = {free.pop(): "exact" for _ in range(copies)} | {free.pop(): "near" for _ in range(copies)}
        self._plain = {*free, 0}
        self._earlier: list[tuple[int, list[Turn]]] = []
        self._planted: list[Planted] = []
        self._pairs: dict[str, list[tuple[int, int]]] = {"exact": [], "near": []}

    def conversations(self) -> Iterator[tuple[int, list[Turn], str]]:
        """Row number, turns and the kind of fault ("" for none)."""
        for row in range(self._n):
            fault = self._fault.get(row)
            kind = fault.kind if fault else ""
            if row in self._copies:
                yield row, self._copy(row), kind
                continue
            turns = self._turns()
            if row in self._plain:
                if len(self._earlier) < 2000:
                    self._earlier.append((row, turns))
            elif row in self._personal:
                turns[0] = ("user", f"{turns[0][1]} {self._plant(row)}")
            elif row in self._crisis:
                turns[0] = ("user", f"{turns[0][1]} {_CRISIS}")
            elif kind == "blank":
                turns[-1] = (turns[-1][0], "  ")
            elif kind == "twice":
                turns.insert(1, ("user", self._rng.choice(self._users)))
            elif kind == "latin":
                turns[0] = ("user", f"{turns[0][1]} {_LATIN}")
            yield row, turns, kind

    def _turns(self) -> list[Turn]:
        count = 1 if self.shape in ("alpaca", "qa") else 2
        turns: list[Turn] = []
        for _ in range(count):
            turns.append(("user", " ".join(self._rng.choices(self._users, k=_SENTENCES))))
            turns.append(("assistant", " ".join(self._rng.choices(self._assistants, k=_SENTENCES))))
        return turns

    def _copy(self, row: int) -> list[Turn]:
        original, turns = self._rng.choice(self._earlier)
        kind = self._copies[row]
        self._pairs[kind].append((row, original))
        if kind == "exact":
            return turns
        words = turns[0][1].split()
        words[self._rng.randrange(3, len(words) - 1)] = "honestly"
        return [("user", " ".join(words)), *turns[1:]]

    def _plant(self, row: int) -> str:
        rng = self._rng
        given, family = rng.choice(_GIVEN), rng.choice(_FAMILY)
        digits = rng.randrange(10, 99)
        phrases = {
            "EMAIL": ("You can write to {}.", f"{given}.{family}{digits}@postbox.org".lower()),
            "PHONE": ("Please call me at {}.", f"(212) 736-{rng.randrange(1000, 9999)}"),
            "SSN": (
                "My social security number is {}.",
                f"{rng.randrange(100, 600)}-{digits}-{rng.randrange(1000, 9999)}",
            ),
            "CARD": ("They charged my card {} again.", rng.choice(_CARDS)),
            "IBAN": ("The money went to {}.", rng.choice(_IBANS)),
            "IP": ("Somebody logged in from the IP address {}.", f"81.2.{digits}.{rng.randrange(2, 250)}"),
            "URL": ("My page is {}.", f"https://www.facebook.com/{given}.{family}.{digits}".lower()),
            "DOB": ("I was born on {}.", f"{rng.randrange(1, 28)} March 19{rng.randrange(50, 99)}"),
            "ADDRESS": ("I live at {}.", f"{digits} {rng.choice(_STREETS)}"),
            "NAME": ("My name is {}.", f"{given} {family}"),
        }
        kind = list(phrases)[len(self._planted) % len(phrases)]
        phrase, value = phrases[kind]
        self._planted.append(Planted(row=row, message=0, kind=kind, value=value))
        return phrase.format(value)

    def truth(self) -> Truth:
        faults = sorted(self._fault.items())
        return Truth(
            rows=self._n,
            rejects=[Rejected(row=row, stage=fault.stage, code=fault.code) for row, fault in faults if fault.stage],
            pii=self._planted,
            exact=self._pairs["exact"],
            near=self._pairs["near"],
            same_role=[row for row, fault in faults if fault.kind == "twice"],
            crisis=sorted(self._crisis),
            departing=[row for row, fault in faults if fault.kind == "latin"],
        )


def _record(shape: Shape, row: int, turns: list[Turn], kind: str) -> dict[str, Any]:
    """The record of a row in its shape, with the faults that live in the shape."""
    record: dict[str, Any] = {"id": f"conversation-{row:07d}"}
    if shape in ("messages", "sharegpt"):
        role, text = ("role", "content") if shape == "messages" else ("from", "value")
        names = (
            {"user": "user", "assistant": "assistant"} if shape == "messages" else {"user": "human", "assistant": "gpt"}
        )
        items: list[dict[str, Any]] = [{role: names[speaker], text: content} for speaker, content in turns]
        if kind == "role":
            items[1][role] = "wizard"
        elif kind == "type":
            items[1][text] = 42
        record["messages" if shape == "messages" else "conversations"] = [] if kind == "none" else items
    elif shape == "transcript":
        lines = "\n".join(f"{'Human' if speaker == 'user' else 'Assistant'}: {content}" for speaker, content in turns)
        record["text"] = " ".join(content for _, content in turns) if kind == "plain" else lines
        if kind == "lead":
            record["text"] = f"{_LEAD}\n{lines}"
    else:
        answer: Any = 42 if kind == "type" else turns[1][1]
        if shape == "alpaca":
            record |= {"instruction": turns[0][1], "input": "", "output": answer}
        else:
            record |= {"question": turns[0][1], "answer": answer}
    record["topic"] = f"topic-{row % 31}"
    return {"id": record["id"], "unrelated": row} if kind == "unknown" else record


def _write_text(sink: IO[bytes], maker: _Maker, container: str) -> None:
    if container == "csv":
        _write_csv(sink, maker)
        return
    if container == "json":
        sink.write(b"[\n")
    for row, turns, kind in maker.conversations():
        data = orjson.dumps(_record(maker.shape, row, turns, kind))
        if kind == "cut":
            data = data[: len(data) // 2]
        elif kind == "nan":
            data = data[:-1] + b',"score":NaN}'
        elif kind == "broken":
            data = data.replace(b'"id":', b'"id" ', 1)
        elif kind == "latin":
            data = data.decode().encode("cp1252")
        if container == "json" and row:
            sink.write(b",\n")
        sink.write(data if container == "json" else data + b"\n")
    if container == "json":
        sink.write(b"\n]\n")


def _write_csv(sink: IO[bytes], maker: _Maker) -> None:
    text = io.TextIOWrapper(sink, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    for row, turns, kind in maker.conversations():
        record = _record(maker.shape, row, turns, kind)
        if row == 0:
            writer.writerow(record)
        fields = [orjson.dumps(value).decode() if isinstance(value, list) else value for value in record.values()]
        if kind == "longer":
            fields.append("more")
        elif kind == "shorter":
            fields.pop()
        writer.writerow(fields)
    text.detach()


def _parquet(maker: _Maker) -> bytes:
    rows = [_record(maker.shape, row, turns, kind) for row, turns, kind in maker.conversations()]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=10_000, compression="zstd")
    return sink.getvalue()


def _compress_bytes(file: IO[bytes], compression: Compression, data: bytes) -> None:
    with _compressor(file, compression) as sink:
        sink.write(data)


def _compressor(file: IO[bytes], compression: Compression) -> IO[bytes]:
    if compression == "gzip":
        return gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=3, mtime=0)  # type: ignore[return-value]  # GzipFile is an IO[bytes] in all but name
    if compression == "zstd":
        writer: IO[bytes] = zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False)
        return writer
    return io.BufferedWriter(io.FileIO(file.fileno(), "wb", closefd=False), 1 << 20)
