"""Write a file in one go: whole and on the disk, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

_BLOCK_BYTES = 1 << 24  # written at a time, so that Ctrl-C need not wait for a large file


def write_atomically(path: str | os.PathLike[str], parts: Iterable[bytes | memoryview]) -> None:
    """Write bytes to a file that takes the place of the one at `path`; on an error or Ctrl-C that one stays as it is.

    It keeps the permissions of the old file, and its owner and group where this process may set them; a new one has
    those that the umask leaves. A symbolic link stays, and what it points to is written. When this returns, the file
    would survive a power cut.

    Args:
        path: of the file.
        parts: of its content, one after another.
    Raises:
        OSError: naming `path`: the disk is full, the folder is missing or read-only, `path` is no regular file.
    """
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".{secrets.token_hex(12)}.new"  # short, as `path` may have the longest legal name
    try:
        try:
            old = _regular_file(target)
            _write(temporary, parts, old)
            temporary.replace(target)
        finally:
            with contextlib.suppress(OSError):  # what went wrong before is what to report
                temporary.unlink(missing_ok=True)
    except OSError as error:
        kept = "; the file that was there is as it was" if os.path.isfile(target) else ""  # noqa: PTH113 - raises nothing
        raise _of_path(error, path, f"{error.strerror or error} (nothing was written{kept})") from None
    try:
        _sync_folder(target.parent)
    except OSError as error:
        said = f"{error.strerror or error} (it is written, but may be lost in a power cut)"
        raise _of_path(error, path, said) from None


def _of_path(error: OSError, path: str | os.PathLike[str], words: str) -> OSError:
    return OSError(error.errno if error.errno is not None else errno.EIO, words, os.fspath(path))


def _regular_file(path: Path) -> os.stat_result | None:
    """The file that is there, None if there is none; OSError if it is no file that another can take the place of."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file")
    return found


def _write(temporary: Path, parts: Iterable[bytes | memoryview], old: os.stat_result | None) -> None:
    mode = 0o666 if old is None else 0o600  # nobody may read of it what they could not read of the old one

    def create(name: str, flags: int) -> int:
        return os.open(name, flags, mode)

    with open(temporary, "xb", buffering=0, opener=create) as file:
        if old is not None:
            for owner in ({"uid": old.st_uid, "gid": old.st_gid}, {"uid": -1, "gid": old.st_gid}):
                with contextlib.suppress(OSError):
                    os.fchown(file.fileno(), **owner)
                    break
            os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))  # after fchown, which takes bits away
        for part in parts:
            left = memoryview(part)
            while left:
                left = left[file.write(left[:_BLOCK_BYTES]) :]
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Bring the new name of a file onto the disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder that may be written to but not listed
        os.sync()
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems have nothing to sync in a folder
            raise
    finally:
        os.close(descriptor)
