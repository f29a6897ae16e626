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
    skipped: tuple[bytes, hashlib._Hash] | None = None
    for chunk in source:
        pieces = chunk.split(b"\n")
        last = pieces.pop()
        for piece in pieces:
            if held or skipped:
                held.append(piece)
                piece = b"".join(held)
                held, size = [], 0
            if skipped or len(piece) > limit:
                item, offset = _oversize(offset, piece, skipped)
                skipped = None
                yield item
                continue
            yield offset, piece
            offset += len(piece) + 1
        if last:
            held.append(last)
            size += len(last)
        if size > limit:
            joined = b"".join(held)
            if skipped is None:
                skipped = joined[:RAW_LIMIT], hashlib.sha256()
            skipped[1].update(joined)
            offset += len(joined)
            held, size = [], 0
    if cut is not None and cut():
        return
    tail = b"".join(held)
    if skipped:
        yield _oversize(offset, tail, skipped)[0]
    elif tail:
        yield offset, tail


def _oversize(offset: int, piece: bytes, skipped: tuple[bytes, "hashlib._Hash"] | None) -> tuple[Oversize, int]:
    head, digest = skipped or (piece[:RAW_LIMIT], hashlib.sha256())
    digest.update(piece)
    return Oversize(offset, head, digest.hexdigest()), offset + len(piece) + 1
