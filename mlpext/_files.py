"""Files that are either whole or absent: a kill at any moment, or a power cut, leaves the old file or the new
one under a name, never a part of one."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write `content` to `path` so that the file is at no time half written; its folder is made if missing.

    Raises OSError where the folder cannot be written, and then leaves nothing behind.

        write_atomically("runs/note.txt", "eta = 0.1")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The new name itself survives a power cut only when the folder has been synced too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files that killed writers left in `folder`."""
    for stale in Path(folder).glob(".*.tmp"):
        stale.unlink(missing_ok=True)
