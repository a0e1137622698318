"""Files of an evaluation: embeddings with ids, labels and the fingerprint of their encoder; the manifest."""

from __future__ import annotations

import io
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines import atomic
from data_pipelines.errors import DataError
from data_pipelines.labelled.arrays import load_npz
from data_pipelines.labelled.patches import LabelledPatches
from histokd_jax.evals.summary import to_json

MANIFEST, EMBEDDINGS, PREDICTIONS, POINTS, REPORT = (
    "probe_manifest.json", "embeddings", "predictions", "points.npz", "report.html",
)  # fmt: skip


def write_bytes(path: pathlib.Path, content: bytes) -> pathlib.Path:
    """Writes a file that is there completely or not at all.

    Raises:
      StorageError: the disk is full or not writable.
    """
    with atomic.storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(atomic.write_temporary(path.parent, path.name, content), path)
    return path


def write_npz(path: pathlib.Path, **arrays: np.ndarray) -> pathlib.Path:
    """Writes arrays atomically; equal arrays give equal bytes."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    return write_bytes(path, content.getvalue())


def write_embeddings(
    path: pathlib.Path, features: np.ndarray, patches: LabelledPatches, encoder: Mapping[str, Any]
) -> pathlib.Path:
    """Writes embeddings with everything that is needed to use them alone; `histokd probe FILE` reads them back.

    Args:
      path: .npz.
      features: [n, D] float32.
      patches: whose they are.
      encoder: facts with "sha256", the fingerprint of weights or values.
    """
    order = {} if patches.order is None else {"order": patches.order}
    return write_npz(
        path,
        features=features,
        ids=np.array(patches.ids),
        label=patches.label,
        class_names=np.array(patches.class_names),
        group=np.array(patches.group),
        part=np.array(patches.part),
        encoder_sha256=np.array(encoder["sha256"]),
        encoder=np.array(json.dumps(to_json(encoder), sort_keys=True)),
        data_fingerprint=np.array(patches.fingerprint()),
        **order,
    )


def stored_embeddings(path: pathlib.Path, patches: LabelledPatches, encoder: Mapping[str, Any]) -> np.ndarray | None:
    """Embeddings that an earlier evaluation wrote for the same patches by the same encoder, or None."""
    if not path.exists():
        return None
    stored = load_npz(path)
    facts = json.dumps(to_json(encoder), sort_keys=True)
    same = str(stored.get("encoder")) == facts and str(stored.get("data_fingerprint")) == patches.fingerprint()
    return stored["features"] if same else None


def check_out(out: pathlib.Path, facts: Mapping[str, Any], overwrite: bool) -> None:
    """Refuses a folder that holds another evaluation.

    Args:
      out: the folder.
      facts: "data_fingerprint", "encoders" and "settings" of this evaluation.
      overwrite: replace another one.

    Raises:
      DataError: naming what differs.
    """
    path = out / MANIFEST
    if not path.exists() or overwrite:
        return
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: cannot be read ({error}); replace it with --overwrite") from error
    differ = [key for key, value in to_json(facts).items() if stored.get(key) != value]
    if differ:
        raise DataError(
            f"{out} holds another evaluation (other {', '.join(differ)}): choose another --out, or replace it with "
            "--overwrite"
        )
