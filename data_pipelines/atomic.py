"""Files that appear complete or not at all: temporaries, fsync, rename, and clear errors of the file system."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping

from data_pipelines.errors import StorageError

TEMP_PREFIX = ".writing-"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_KNOWN = (*_DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)


@contextlib.contextmanager
def storage_errors(target: pathlib.Path) -> Iterator[None]:
    """Turns failures of the file system into StorageError.

    ArrayRecord reports them as RuntimeError, with the text but without the number of the error.

    Args:
      target: what is being written, for the message.

    Raises:
      StorageError: if the body raises OSError or RuntimeError.
    """
    try:
        yield
    except StorageError:
        raise
    except (OSError, RuntimeError) as error:
        number = getattr(error, "errno", None) or _errno_of(str(error))
        fix = "free some space" if number in _DISK_FULL else "check that the folder exists and is writable"
        reason = getattr(error, "strerror", None) or error
        raise StorageError(number, f"writing {target} failed: {reason}; {fix}") from error


def _errno_of(message: str) -> int:
    return next((number for number in _KNOWN if os.strerror(number) in message), errno.EIO)


def sync(path: pathlib.Path) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Where a file is written before it gets its name."""
    return directory / f"{TEMP_PREFIX}{name}"


def write_temporary(directory: pathlib.Path, name: str, content: bytes) -> pathlib.Path:
    """Writes a temporary file durably and returns its path."""
    path = temporary(directory, name)
    path.write_bytes(content)
    sync(path)
    return path


def remove_temporaries(directory: pathlib.Path) -> None:
    """Removes what an interrupted writer left behind."""
    for path in directory.glob(f"{TEMP_PREFIX}*"):
        path.unlink()


def publish(
    moves: Mapping[pathlib.Path, pathlib.Path],
    seal: tuple[pathlib.Path, pathlib.Path],
    stale: Collection[pathlib.Path] = (),
) -> None:
    """Renames temporaries to their names, and last of all the seal, without which the folder counts as incomplete.

    An old seal is removed first, so that at no moment a seal stands beside files that it does not describe.

    Args:
      moves: durable temporary file -> final name, in the same folder.
      seal: the same for the file that declares the others complete.
      stale: files of an older version, removed in the same step.
    """
    temporary_seal, final_seal = seal
    final_seal.unlink(missing_ok=True)
    sync(final_seal.parent)
    for path in stale:
        path.unlink()
    for source, target in moves.items():
        os.replace(source, target)
    sync(final_seal.parent)
    os.replace(temporary_seal, final_seal)
    sync(final_seal.parent)
