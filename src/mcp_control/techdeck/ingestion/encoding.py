"""Which encoding the text has: byte order mark, then strict UTF-8, then a guess from enough bytes, then cp1252.

Guessing needs at least 1 KiB of bytes that are not UTF-8, because detectors name short western text wrongly.
Source: design of techdeck, section 2.
"""

import codecs
from collections.abc import Iterable, Iterator

import charset_normalizer
import msgspec

from mcp_control.techdeck.ingestion.streams import Oversize, lines
from mcp_control.techdeck.model import MIB, DataError

# Longest first: the UTF-32 mark begins with the UTF-16 one.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SAMPLE = 64 * 1024
_ENOUGH = 1024
_WESTERN_SHARE = 0.03
"""Below this share of non-ASCII bytes the text is western and a guess among its code pages is worth nothing."""
_MULTIBYTE = ("utf_16", "utf_32", "utf_7", "shift_jis", "cp932", "gb", "big5", "cp950", "cp949", "euc", "iso2022", "hz")


class Encoding(msgspec.Struct, frozen=True, kw_only=True):
    """How bytes become text.

    `name` is the file's encoding, `fallback` decodes rows that are not UTF-8, `mark` is the length of the byte order
    mark. With `transcode` the whole stream is turned into UTF-8 first, because its newlines or quotes may not be single
    bytes. `mixed` says that fallback rows deserve a warning.
    """

    name: str = "utf-8"
    fallback: str | None = None
    mark: int = 0
    transcode: bool = False
    mixed: bool = False


def mark_of(head: bytes) -> tuple[str, int] | None:
    """The encoding that a byte order mark names and the mark's length, or None."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name, len(mark)
    return None


def survey(source: Iterable[bytes], head: bytes, given: str | None, strict: bool) -> Encoding:
    """Read the whole stream once and decide. Raises DataError E_ENCODING for an unknown name in `given`."""
    mark = mark_of(head)
    if mark and mark[0] != "utf-8":
        return Encoding(name=mark[0], mark=mark[1], transcode=True)
    length = mark[1] if mark else 0
    if given is not None:
        try:
            name = codecs.lookup(given).name
        except LookupError:
            raise DataError("E_ENCODING", "the given encoding is not known") from None
        return Encoding(name=name, fallback=name, mark=length, transcode=_multibyte(name))
    return _guess(source, length, strict)


def _guess(source: Iterable[bytes], mark: int, strict: bool) -> Encoding:
    chunks = iter(source)
    decoder = codecs.getincrementaldecoder("utf-8")()
    unicode_seen = False
    for chunk in chunks:
        try:
            text = decoder.decode(chunk)
        except UnicodeDecodeError:
            break
        unicode_seen = unicode_seen or not text.isascii()
    else:
        return Encoding(mark=mark)
    if strict:
        return Encoding(mark=mark)
    held, high = bytearray(), 0
    for item in lines(_chain(chunk, chunks), 8 * MIB):
        if isinstance(item, Oversize) or item[1].isascii():
            continue
        try:
            item[1].decode()
            unicode_seen = True
        except UnicodeDecodeError:
            if len(held) < _SAMPLE:
                held += item[1][:_SAMPLE] + b"\n"
                high += sum(byte > 127 for byte in item[1][:_SAMPLE])
    name = _guess_name(bytes(held), high)
    if high >= _ENOUGH and not unicode_seen:
        return Encoding(name=name, fallback=name, mark=mark, transcode=_multibyte(name))
    fallback = "cp1252" if _multibyte(name) else name
    return Encoding(fallback=fallback, mark=mark, mixed=True)


def _guess_name(sample: bytes, high: int) -> str:
    if high < _ENOUGH or high < _WESTERN_SHARE * len(sample):
        return "cp1252"
    best = charset_normalizer.from_bytes(sample).best()
    return "cp1252" if best is None or best.encoding in ("ascii", "utf_8") else codecs.lookup(best.encoding).name


def _multibyte(name: str) -> bool:
    return name.replace("-", "_").startswith(_MULTIBYTE)


def _chain(first: bytes, rest: Iterable[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def as_utf8(source: Iterable[bytes], encoding: Encoding, strict: bool) -> Iterator[bytes]:
    """The stream without its mark and, where `encoding` asks for it, turned into UTF-8.

    Undecodable bytes of a transcoded stream become U+FFFD, or DataError E_ENCODING when `strict`.
    """
    skip = encoding.mark
    decoder = codecs.getincrementaldecoder(encoding.name)("strict" if strict else "replace")
    for chunk in source:
        if skip:
            chunk, skip = chunk[skip:], max(0, skip - len(chunk))
        if not encoding.transcode:
            yield chunk
            continue
        try:
            yield decoder.decode(chunk).encode()
        except UnicodeDecodeError as error:
            raise DataError("E_ENCODING", f"byte 0x{error.object[error.start]:02x} is not {encoding.name}") from None
    if encoding.transcode:
        yield decoder.decode(b"", final=True).encode()


def decode(raw: bytes, encoding: Encoding) -> tuple[str, str, bool]:
    """Text of one record, the encoding that gave it, and whether the row departs from UTF-8.

    Raises UnicodeDecodeError when no allowed encoding fits.
    """
    if encoding.transcode:
        return raw.decode(), encoding.name, False
    if encoding.fallback is not None and encoding.name != "utf-8":
        return raw.decode(encoding.fallback), encoding.name, False
    try:
        return raw.decode(), "utf-8", False
    except UnicodeDecodeError:
        if encoding.fallback is None or encoding.fallback == "utf-8":
            raise
        return raw.decode(encoding.fallback), encoding.fallback, True
