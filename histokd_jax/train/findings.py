"""What a run finds out about itself while training, said once and kept in the folder of the fold (findings.json)."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

from absl import logging

from data_pipelines.atomic import storage_errors
from histokd_jax.evals.predictions import atomic_writer
from histokd_jax.train import distributed

FILE = "findings.json"


def tell(directory: pathlib.Path, found: Mapping[str, str], when: str) -> dict[str, str]:
    """Warns of findings that were not told before, also not by an earlier sitting of the same run.

    Args:
      directory: folder of the fold.
      found: kind -> text with the evidence, see `Task.watch`.
      when: e.g. "epoch 3".

    Returns:
      The new ones: kind -> what was said.
    """
    if not found or not distributed.is_main():
        return {}
    path = directory / FILE
    known = json.loads(path.read_text()) if path.exists() else {}
    new = {kind: f"{when}: {text}" for kind, text in found.items() if kind not in known}
    for text in new.values():
        logging.warning("%s, %s", directory.name, text)
    if new:
        with storage_errors(path), atomic_writer(path) as stream:
            json.dump({**known, **new}, stream, indent=2, sort_keys=True)
    return new
