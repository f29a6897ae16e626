"""The input as a bounded stream of decompressed bytes and lines."""

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import zstandard

from mcp_control.techdeck.model import MIB, RAW_LIMIT, DataError

CHUNK = MIB
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_RATIO_FLOOR = 16 * MIB
"""Output below this many bytes is never called a bomb, whatever its ratio."""
# A slice of input expands to at most about 1000 times its size in gzip and 32,000 times in zstd: small slices bound it.
_SLICE = {"gzip": 16 * 1024, "zstd": 4 * 1024}


class StreamDamagedError(Exception):
    """A compressed stream ended early or is corrupt; everything before was delivered. `size` is the bytes delivered."""

    def __init__(self, code: str, size: int) -> None:
        super().__init__(code)
        self.code = code
        self.size = size


class Oversize(NamedTuple):
    """A record over the limit, skipped while reading: where it began, its first bytes and the digest of all of it."""

    offset: int
    head: bytes
    sha256: str


class Skipping:
    """A record over the limit while its end is looked for: only its first bytes and its digest are kept."""

    def __init__(self, offset: int) -> None:
        self._offset = offset
        self._head = b""
        self._digest = hashlib.sha256()

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the record."""
        if len(self._head) < RAW_LIMIT:
            self._head += data[: RAW_LIMIT - len(self._head)]
        self._digest.update(data)

    def done(self) -> Oversize:
        """The record has ended."""
        return Oversize(self._offset, self._head, self._digest.hexdigest())


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def compression_of(head: bytes) -> str:
    """Name the compression that the first bytes show: none, gzip or zstd."""
    if head.startswith(GZIP_MAGIC):
        return "gzip"
    return "zstd" if head.startswith(ZSTD_MAGIC) else "none"


def file_chunks(path: Path, size: int = CHUNK) -> Iterator[bytes]:
    """The file's bytes as they are."""
    with path.open("rb") as file:
        while chunk := file.read(size):
            yield chunk


def chunks(path: Path, compression: str, max_ratio: int) -> Iterator[bytes]:
    """Decompressed bytes in pieces of about `CHUNK`.

    Raises DataError E_RATIO when the output exceeds `max_ratio` times the input, and StreamDamagedError after the
    last good byte of a truncated or corrupt stream.
    """
    if compression == "none":
        yield from file_chunks(path)
        return
    pieces: list[bytes] = []
    held = 0
    try:
        for piece in _decompressed(path, compression, max_ratio):
            pieces.append(piece)
            held += len(piece)
            if held >= CHUNK:
                yield b"".join(pieces)
                pieces, held = [], 0
    except StreamDamagedError:
        if pieces:
            yield b"".join(pieces)
        raise
    if pieces:
        yield b"".join(pieces)


def _decompressed(path: Path, compression: str, max_ratio: int) -> Iterator[bytes]:
    magic = GZIP_MAGIC if compression == "gzip" else ZSTD_MAGIC
    decompressor = _decompressor(compression)
    size_in = size_out = 0
    for data in file_chunks(path, _SLICE[compression]):
        size_in += len(data)
        rest = data
        while rest:
            if decompressor.eof:  # a further member; anything else after the end is padding
                if not rest.startswith(magic):
                    return
                decompressor = _decompressor(compression)
            try:
                piece = decompressor.decompress(rest)
            except (zlib.error, zstandard.ZstdError) as error:
                raise StreamDamagedError("E_CORRUPT", size_out) from error
            rest = decompressor.unused_data if decompressor.eof else b""
            size_out += len(piece)
            if size_out > _RATIO_FLOOR and size_out > max_ratio * size_in:
                raise DataError("E_RATIO", f"decompressed size is over {max_ratio} times the compressed size")
            if piece:
                yield piece
    if not decompressor.eof:
        raise StreamDamagedError("E_TRUNCATED", size_out)


def _decompressor(compression: str) -> _Decompressor:
    if compression == "gzip":
        return zlib.decompressobj(wbits=31)
    return zstandard.ZstdDecompressor().decompressobj()


def lines(
    source: Iterable[bytes], limit: int, offset: int = 0, cut: Callable[[], bool] | None = None
) -> Iterator[tuple[int, bytes] | Oversize]:
    """Each line without its newline, with its byte offset; a line over `limit` bytes comes as `Oversize`.

    A last line without newline is left out when `cut` says that the stream broke off.
    """
    held: list[bytes] = []
    size = 0
    skipping: Skipping | None = None
    for chunk in source:
        pieces = chunk.split(b"\n")
        last = pieces.pop()
        for piece in pieces:
            if held:
                held.append(piece)
                piece = b"".join(held)
                held, size = [], 0
            if skipping is not None or len(piece) > limit:
                skipping = skipping or Skipping(offset)
                skipping.feed(piece)
                yield skipping.done()
                skipping = None
            else:
                yield offset, piece
            offset += len(piece) + 1
        if last:
            held.append(last)
            size += len(last)
        if size > limit or (skipping is not None and held):
            skipping = skipping or Skipping(offset)
            for piece in held:
                skipping.feed(piece)
            offset += size
            held, size = [], 0
    if cut is not None and cut():
        return
    if skipping is not None:
        yield skipping.done()
    elif held:
        yield offset, b"".join(held)
