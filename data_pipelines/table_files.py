"""Writes small tables and JSON files atomically; equal content is equal bytes on every platform."""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from data_pipelines import atomic


def write_csv(path: pathlib.Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a UTF-8 table with LF line ends; missing parent folders are created.

    Args:
      path: the file.
      header: column names.
      rows: one sequence per row, cells converted by str.
    """
    text = io.StringIO(newline="")
    out = csv.writer(text, lineterminator="\n")
    out.writerow(header)
    out.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes indented JSON; missing parent folders are created."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that appears complete or not at all; missing parent folders are created.

    Raises:
      StorageError: if the disk is full or not writable.
    """
    with atomic.storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(atomic.write_temporary(path.parent, path.name, content), path)
        atomic.sync(path.parent)
