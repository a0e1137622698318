"""Metrics to disk: one JSON line per epoch and split, and TensorBoard event files without TensorFlow."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from data_pipelines.atomic import storage_errors


class MetricWriter:
    """Appends to `metrics.jsonl` and `tensorboard/` in a fold's folder. Use as a context manager.

    Args:
      directory: the fold's folder.
      upto_step: lines beyond this global step are dropped (they were written after the checkpoint that is resumed).
    """

    def __init__(self, directory: pathlib.Path, upto_step: int = -1):
        self._path = directory / "metrics.jsonl"
        with storage_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            kept = [line for line in self._lines() if json.loads(line)["step"] <= upto_step]
            self._path.write_text("".join(kept))
        # Imported here: it starts a thread and is not needed for reading.
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=upto_step + 1, flush_secs=30)

    def _lines(self) -> list[str]:
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        # A killed run may leave its last line cut short.
        return [line for line in lines if line.endswith("\n")]

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *exc) -> None:
        with storage_errors(self._path.parent):
            self._board.close()

    def write(self, step: int, facts: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """One line.

        Args:
          step: global step.
          facts: e.g. {"epoch": 3, "split": "val", "stage": "online"}.
          metrics: name -> value; NaN is written as null.
        """
        values = {k: (float(v) if math.isfinite(v) else None) for k, v in metrics.items()}
        with storage_errors(self._path), self._path.open("a") as stream:
            stream.write(json.dumps({"step": step, **facts, **values}) + "\n")
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(f"{facts.get('split', 'train')}/{name}", value, step)


class NoWriter:
    """Takes the place of `MetricWriter` where nothing is written: on all processes but the first."""

    def __enter__(self) -> NoWriter:
        return self

    def __exit__(self, *exc) -> None:
        pass

    def write(self, step: int, facts: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Writes nothing; arguments as in `MetricWriter.write`."""
