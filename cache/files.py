"""Files that appear whole or not at all, and never in place of another.

`publish` is the one way in which plans, leases and records come to be: the content is written under a private name
on the same file system, flushed to the disk, and linked to its public name, which fails if that name exists. A reader
therefore never sees half a file, and of two writers exactly one succeeds.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def fsync_folder(folder: Path) -> None:
    """Make the folder's names durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(file: Path, content: bytes | memoryview) -> None:
    """Create `file` with `content`, durable and all at once; raises FileExistsError if it is there already."""
    file.parent.mkdir(parents=True, exist_ok=True)
    private = file.parent / f".{file.name}.{secrets.token_hex(8)}"
    try:
        with private.open("xb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.link(private, file)
    finally:
        private.unlink(missing_ok=True)
    try:
        fsync_folder(file.parent)
    except OSError:  # what is reported as failed must not be there
        file.unlink(missing_ok=True)
        raise
