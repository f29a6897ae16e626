"""The data folder: one server at a time, a local disk, a file that is ours, and a reserve of space."""

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mcp_control.kernel.errors import StoreUnavailable
from mcp_control.storage.sqlite.schema import APPLICATION_ID

# Locks and shared memory do not work there as SQLite needs them (https://www.sqlite.org/wal.html#overview).
_NETWORK: Final = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb2",
        "smb3",
        "smbfs",
        "ncpfs",
        "afs",
        "9p",
        "ceph",
        "lustre",
        "gfs2",
        "ocfs2",
        "glusterfs",
        "davfs",
    }
)
_HEADER_BYTES: Final = 100
_MAGIC: Final = b"SQLite format 3\0"

FilesystemOf = Callable[[Path], str]


def filesystem_of(path: Path) -> str:
    """Return the type of the file system that holds the path, as in /proc/mounts; empty where that cannot be told."""
    try:
        mounts = Path("/proc/self/mounts").read_text(errors="replace")
    except OSError:
        return ""
    found, longest = "", -1
    target = str(path.resolve())
    for line in mounts.splitlines():
        parts = line.split(" ")
        if len(parts) < 3:
            continue
        mount = parts[1].replace("\\040", " ")
        inside = target == mount or target.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= longest:  # of two mounts on one point the later is on top
            found, longest = parts[2], len(mount)
    return found


def is_network(kind: str) -> bool:
    """Say whether a type of file system reaches over a network."""
    return kind in _NETWORK or kind.startswith(
        ("fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3", "fuse.rclone", "fuse.juicefs")
    )


def prepare(directory: Path, filesystem: FilesystemOf) -> None:
    """Make the folder, readable by its owner alone, and refuse network file systems. Raises StoreUnavailable."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreUnavailable(f"the data folder {directory} cannot be made: {error.strerror}") from None
    kind = filesystem(directory)
    if is_network(kind):
        raise StoreUnavailable(
            f"the data folder {directory} is on a network file system ({kind}); SQLite needs a local disk"
        )


def lock(directory: Path) -> int:
    """Take the folder's lock and write our process id into it; closing the returned descriptor gives it back.

    Child processes do not inherit it. Raises StoreUnavailable where another process holds it.
    """
    try:
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreUnavailable(f"the data folder {directory} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise StoreUnavailable(f"the data folder {directory} is in use by another server (process {holder})") from None
    os.ftruncate(descriptor, 0)
    with contextlib.suppress(OSError):  # a full disk; the number is for people, the lock is what counts
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def check_header(path: Path) -> None:
    """Refuse a database file whose first bytes cannot be ours, without opening it; a missing or empty file is fine.

    Raises StoreUnavailable.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreUnavailable(f"the database {path} cannot be read: {error.strerror}") from None
    if size == 0:
        return
    page = int.from_bytes(header[16:18])
    page = 65536 if page == 1 else page
    # https://www.sqlite.org/fileformat.html#the_database_header
    sound = (
        len(header) == _HEADER_BYTES
        and header[:16] == _MAGIC
        and page >= 512
        and page & (page - 1) == 0
        and size % page == 0
        and header[18:20] in (b"\x01\x01", b"\x02\x02")
        and header[20:24] == bytes((0, 64, 32, 32))
        and int.from_bytes(header[44:48]) in (0, 4)
        and int.from_bytes(header[56:60]) in (0, 1)
        and int.from_bytes(header[68:72]) in (0, APPLICATION_ID)
        and not any(header[72:92])
    )
    if not sound:
        raise StoreUnavailable(
            f"the database {path} is damaged or not ours (its header is wrong); restore a backup; it was not touched"
        )


class Ballast:
    """A file that holds space back, to be given up when the disk is full: deleting rows and copying the log need some.

    Args:
        path: the file.
        size: bytes to hold; 0 holds none.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size

    def take(self) -> bool:
        """Hold the space; false where the disk has not got it with a quarter to spare."""
        try:
            if self._path.exists() and self._path.stat().st_size == self._size:
                return True
            disk = os.statvfs(self._path.parent)
            if disk.f_bavail * disk.f_frsize < self._size + max(self._size // 4, 256 * 1024):
                return False
            if self._size:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                try:
                    os.posix_fallocate(descriptor, 0, self._size)
                finally:
                    os.close(descriptor)
        except OSError:
            self.give()
            return False
        return True

    def give(self) -> None:
        """Free the space."""
        self._path.unlink(missing_ok=True)
