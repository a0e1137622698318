"""Encoders of our own: a folder with encoder.json (architecture and conventions) and weights.npz.

What self-supervised training writes here, `histokd embed --weights FOLDER` reads.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines import atomic
from data_pipelines.errors import DataError
from histokd_jax.encoders.presets import Encoder, Transform
from histokd_jax.encoders.variables import fingerprint, flatten, unflatten
from histokd_jax.nn.encoders import build
from histokd_jax.nn.encoders.specs import ResNetSpec, Spec, ViTSpec

ENCODER_FILE, WEIGHTS_FILE = "encoder.json", "weights.npz"
FORMAT = 1
_KINDS = {"vit": ViTSpec, "resnet": ResNetSpec}


def spec_facts(spec: Spec) -> dict[str, Any]:
    """A specification as JSON."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(spec, cls))
    return {"kind": kind, **dataclasses.asdict(spec)}


def spec_from(facts: Mapping[str, Any]) -> Spec:
    """The inverse of `spec_facts`.

    Raises:
      ValueError: unknown kind or fields.
    """
    values = dict(facts)
    cls = _KINDS.get(values.pop("kind", None))
    if cls is None:
        raise ValueError(f"the kind of architecture is {facts.get('kind')!r}, expected one of {sorted(_KINDS)}")
    try:
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from error


def save(directory: pathlib.Path, encoder: Encoder, variables: Mapping[str, Any], **facts: Any) -> str:
    """Writes an encoder; encoder.json last, so that an incomplete folder has none. Equal content gives equal bytes.

    Args:
      directory: the folder.
      encoder: architecture and conventions.
      variables: float arrays, "params" and for ResNets "batch_stats".
      **facts: further JSON facts, e.g. how it was trained.

    Returns:
      The fingerprint of the weights.

    Raises:
      ValueError: the variables are not those of the architecture.
      StorageError: the disk is full or not writable.
    """
    flat = {path: np.asarray(value, np.float32) for path, value in flatten(variables).items()}
    _check(encoder, {path: value.shape for path, value in flat.items()}, str(directory))
    content = io.BytesIO()
    np.savez(content, **flat)
    record = {
        "format": FORMAT,
        "name": encoder.name,
        "architecture": spec_facts(encoder.spec),
        "transform": dataclasses.asdict(encoder.transform),
        "mpp": list(encoder.mpp),
        "licence": encoder.licence,
        "weights_sha256": fingerprint(variables),
        "facts": facts,
    }
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n"
    with atomic.storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in ((WEIGHTS_FILE, content.getvalue()), (ENCODER_FILE, text.encode())):
            os.replace(atomic.write_temporary(directory, name, data), directory / name)
        atomic.sync(directory)
    return record["weights_sha256"]


def load(directory: pathlib.Path) -> tuple[Encoder, dict[str, Any]]:
    """Reads an encoder that `save` wrote.

    Args:
      directory: the folder.

    Returns:
      (encoder, float32 variables).

    Raises:
      DataError: no encoder there, files that cannot be read or do not belong together.
    """
    directory = pathlib.Path(directory)
    path = directory / ENCODER_FILE
    try:
        record = json.loads(path.read_bytes())
        encoder = Encoder(
            record["name"],
            spec_from(record["architecture"]),
            Transform(**record["transform"]),
            tuple(record["mpp"]),
            record["licence"],
        )
        with np.load(directory / WEIGHTS_FILE, allow_pickle=False) as stored:
            flat = {name: stored[name] for name in stored.files}
    except FileNotFoundError as error:
        raise DataError(f"{directory}: no encoder folder, {error.filename} does not exist") from error
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{directory}: {ENCODER_FILE} or {WEIGHTS_FILE} cannot be read: {error}") from error
    _check(encoder, {name: value.shape for name, value in flat.items()}, str(directory))
    variables = unflatten(flat)
    if fingerprint(variables) != record.get("weights_sha256"):
        raise DataError(f"{directory}: {WEIGHTS_FILE} differs from its hash in {ENCODER_FILE}: damaged?")
    return encoder, variables


def _check(encoder: Encoder, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    expected = {path: tuple(leaf.shape) for path, leaf in flatten(build.shapes(encoder.spec)).items()}
    differ = sorted(path for path in {*found, *expected} if found.get(path) != expected.get(path))
    if differ:
        told = ", ".join(f"{p}: {found.get(p)}, expected {expected.get(p)}" for p in differ[:6])
        raise DataError(f"{where}: {len(differ)} arrays do not fit the architecture of {encoder.name}: {told}")
