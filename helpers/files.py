"""Files that are there whole or not at all, and that the umask opens to others."""

import hashlib
import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that a reader sees the old one or the new one, and never half of it.

    Args:
        path: the file; its folder is made.
        write: writes it whole, to the path that it is given.

    Raises:
        OSError: if it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        part.touch()
        mode = part.stat().st_mode
        write(part)
        part.chmod(mode)  # some libraries write files that nobody else may read
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    replace(path, lambda part: part.write_text(text, "utf-8"))


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: Path) -> None:
    """Check that files can be written to a folder, which need not be there yet; nothing is made.

    Raises:
        OSError: if they cannot; the message is a clause that says why.
    """
    if "\0" in str(folder):
        raise OSError("it holds a null byte")
    below = folder
    while not os.path.lexists(below) and below != below.parent:
        if len(os.fsencode(below.name)) > 255:
            raise OSError("it has a name that is too long")
        below = below.parent
    if not below.is_dir():
        raise NotADirectoryError(f"{below} is no folder")
    try:
        if not os.access(below, os.W_OK | os.X_OK):
            raise PermissionError
        with tempfile.TemporaryFile(dir=below):  # a superuser is told that every folder can be written
            pass
    except OSError as error:
        raise OSError(f"{below} cannot be written ({error.strerror or 'permission denied'})") from None
