"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place if the block succeeds.

    A link is followed, not replaced; who may read a file that was there may read the new one. Raises
    OSError as writing does.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
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
