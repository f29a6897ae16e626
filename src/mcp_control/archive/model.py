"""What backups and bundles say of themselves."""

from typing import Final

import msgspec

from mcp_control.kernel.changes import Kind

BACKUP_FORMAT: Final = 1
BUNDLE: Final = "bundle"


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first member of a backup.

    Attributes:
        format: of the file; a program reads its own and older ones.
        product: version of the program that wrote it.
        store: `sqlite` or `mongodb`; `bundle` for the bundle of one run.
        run: id of the run in a bundle.
        created_at: wall milliseconds.
        newest_seq: place of the newest event.
        kinds: what is kept, with its index fields and cold parts.
    """

    format: int = BACKUP_FORMAT
    product: str
    store: str
    run: str = ""
    created_at: int
    newest_seq: int
    kinds: list[Kind]


class KindCount(msgspec.Struct, frozen=True, kw_only=True):
    """How many entities of a kind there are, and the SHA-256 over all of them in the order of their ids."""

    name: str
    count: int
    sha256: str


class FactRange(msgspec.Struct, frozen=True, kw_only=True):
    """The events: first and last place (0 where there are none), how many, and the SHA-256 over all of them in order."""

    first: int = 0
    last: int = 0
    count: int = 0
    sha256: str = ""


class BlobEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A blob by its SHA-256, and its size."""

    sha256: str
    size: int


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the file: its name, its size there and the SHA-256 of its bytes there."""

    name: str
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The last member of a backup: what must be in it.

    Attributes:
        blobs: what artifacts name; empty when they were left out.
        blobs_left_out: whether they were.
        blobs_missing: digests of blobs that went while the backup was made, with the artifacts that named them.
        members: all members before this one, in their order.
    """

    kinds: list[KindCount]
    facts: FactRange
    blobs: list[BlobEntry]
    blobs_left_out: bool = False
    blobs_missing: list[str] = []
    members: list[Member]


class BackupDamaged(Exception):
    """A file is no backup, or not as it was written.

    Args:
        where: the first bad part.
        why: what is wrong with it.
    """

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where = where
        self.why = why
