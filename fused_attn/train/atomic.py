"""Files that are complete or absent, never half-written."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace a text file, complete or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")  # several processes may write it
    temporary.write_text(text)
    flush(temporary)
    os.replace(temporary, path)


def flush(path: Path) -> None:
    """Return only when a file or folder is on the disk, not in the system's cache alone (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
