"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place if the block succeeds.

    A link is followed, not replaced; who may read a file that was there may read the new one. Raises
    OSError as writing does.
    """
    target = Path(os.path.realpath(path))
    # Not with the target's name in it, which may be as long as a name can be.
    temporary = target.with_name(f".{secrets.token_hex(8)}.part")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        mode = stat.S_IMODE((target if target.is_file() else temporary).stat().st_mode)
        temporary.chmod(mode)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(mode)  # again: safetensors puts a file of its own there
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Try whether `whole_file` can write there, before there is something to lose.

    Raises:
        OSError: if it cannot.
    """
    target = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):
        target.stat()
    with tempfile.TemporaryFile(dir=target.parent):
        pass


def hold(folder: str | os.PathLike[str]) -> Callable[[], None]:
    """Keep other processes out of a folder, until what is returned is called.

    Where the system or the file system has no locks, nobody is kept out.

    Raises:
        BlockingIOError: if another is in it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return lambda: None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        pass
    return partial(os.close, handle)


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Add a line to a file; it is on the disk when this returns.

    Several processes may add to one file. What a process that was killed left of a line is ended, so
    that it spoils no other.
    """
    with open(path, "ab+") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = f"\n{line}"
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Have all files of a folder, and their names, on the disk, before it is renamed."""
    for path in [*Path(folder).iterdir(), Path(folder)]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
