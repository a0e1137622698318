"""What is probed: encoders and feature arrays, named on one line each.

[LABEL=]FOLDER                     an encoder that this library trained (encoder.json, weights.npz)
[LABEL=]PRESET[,KEY=VALUE]@FILE    a published architecture with a local checkpoint, e.g. uni@uni.safetensors
[LABEL=]PRESET[,KEY=VALUE]@random:SEED    the same with random weights, as a floor
[LABEL=]FILE.npy, FILE.npz[:ARRAY] features of the same patches
[LABEL=]array:NAME                 a feature array of the data itself
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.labelled.arrays import read_features
from data_pipelines.labelled.patches import LabelledPatches
from histokd_jax.encoders import folder, loading, presets
from histokd_jax.encoders.loading import RANDOM, LoadedEncoder

ARRAY, RANDOM_PREFIX = "array:", "random:"
_LABEL = re.compile(r"[A-Za-z0-9_.+-]+")
MEAN, REFUSE = "mean", "refuse"


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One thing that is probed.

    Attributes:
      label: its name in tables and files.
      loaded: the encoder, or None.
      features: [n, D] float32 that were given instead, or None.
      text: as it was named.
    """

    label: str
    loaded: LoadedEncoder | None
    features: np.ndarray | None
    text: str

    def facts(self) -> dict[str, Any]:
        """What is recorded about it, JSON-able; `sha256` identifies weights or values."""
        if self.loaded is not None:
            return {"kind": "encoder", "sha256": self.loaded.sha256, **self.loaded.facts()}
        digest = hashlib.sha256(np.ascontiguousarray(self.features)).hexdigest()
        return {"kind": "features", "name": self.text, "width": self.features.shape[1], "sha256": digest}

    @property
    def marks(self) -> tuple[str, ...]:
        """What must be said beside its numbers."""
        if self.loaded is not None and self.loaded.weights.startswith(RANDOM):
            return (f"{self.label}: random weights, not trained",)
        return ()


def open_sources(texts: Sequence[str], patches: LabelledPatches, missing: str = REFUSE) -> list[Source]:
    """Opens everything that is to be probed.

    Args:
      texts: see above; empty: all arrays of the data.
      patches: the data.
      missing: "refuse" features that are not finite, or "mean": they become the mean of the training part (NaN here).

    Returns:
      The sources, in this order.

    Raises:
      DataError: nothing to probe, a label twice, an unknown array, or features that are not finite.
      ValueError: an encoder that cannot be opened.
    """
    texts = list(texts) or [ARRAY + name for name in patches.arrays]
    if not texts:
        raise DataError(f"{patches.name} holds images only: name what to probe with --encoder")
    found = [_open(text, patches, missing) for text in texts]
    labels = [source.label for source in found]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise DataError(f"--encoder: the names {twice} occur twice; give others, like --encoder before={texts[0]}")
    return found


def _open(text: str, patches: LabelledPatches, missing: str) -> Source:
    label, what = _label_of(text)
    features, loaded = None, None
    if what.startswith(ARRAY):
        features = _own_array(patches, what.removeprefix(ARRAY))
    elif _file_of(what) is not None:
        features = read_features(*_file_of(what), patches.ids)
    elif "@" in what:
        loaded = _preset(*what.split("@", 1))
    elif (pathlib.Path(what) / folder.ENCODER_FILE).exists():
        loaded = loading.load_folder(pathlib.Path(what))
    else:
        raise DataError(
            f"--encoder {text}: no encoder folder ({folder.ENCODER_FILE} is missing), no PRESET@FILE, no .npy or .npz "
            "file and no array:NAME; `histokd embed --list-encoders` names the presets"
        )
    if loaded is not None and patches.read is None:
        raise DataError(f"--encoder {text}: {patches.name} holds no images, only features: {sorted(patches.arrays)}")
    if features is not None:
        features = _finite(features, text, patches, missing)
    return Source(label, loaded, features, what)


def _label_of(text: str) -> tuple[str, str]:
    """(label, what): a name in front of the first "=", if it is one; otherwise the last part of the path."""
    head, equals, tail = text.partition("=")
    if equals and _LABEL.fullmatch(head):
        return head, tail
    stem = text.split("@")[0].removeprefix(ARRAY)
    stem = stem if "@" in text else pathlib.PurePath(stem.split(":")[-1].rstrip("/")).name
    found = re.sub(r"[^A-Za-z0-9_.+-]+", "_", stem.removesuffix(".npz").removesuffix(".npy")).strip("_.")
    if not found:
        raise DataError(f"--encoder {text!r}: has no name; give one, like --encoder mine={text}")
    return found, text


def _file_of(what: str) -> tuple[pathlib.Path, str] | None:
    """(file, array) of a feature file."""
    path, _, array = what.partition(".npz:")
    if array:
        return pathlib.Path(f"{path}.npz"), array
    return (pathlib.Path(what), "") if what.endswith((".npy", ".npz")) and "@" not in what else None


def _own_array(patches: LabelledPatches, name: str) -> np.ndarray:
    if name not in patches.arrays:
        raise DataError(f"--encoder {ARRAY}{name}: {patches.name} has the arrays {sorted(patches.arrays)}")
    return patches.arrays[name]


def _preset(architecture: str, weights: str) -> LoadedEncoder:
    name, *settings = _settings(architecture)
    encoder = presets.changed(presets.get(name), settings)
    if not weights.startswith(RANDOM_PREFIX):
        return loading.load(encoder, pathlib.Path(weights))
    seed = weights.removeprefix(RANDOM_PREFIX)
    if not seed.isdecimal():
        raise DataError(f"--encoder {architecture}@{weights}: expected random:SEED with a whole number")
    return loading.random(encoder, int(seed))


def _settings(architecture: str) -> list[str]:
    """ "resnet50,blocks=3,4,6,width=8" -> its name and every KEY=VALUE, whose value may hold commas."""
    parts = architecture.split(",")
    found = parts[:1]
    for part in parts[1:]:
        found += [part] if "=" in part or len(found) == 1 else [f"{found.pop()},{part}"]
    return found


def _finite(features: np.ndarray, text: str, patches: LabelledPatches, missing: str) -> np.ndarray:
    bad = ~np.isfinite(features)
    if not bad.any():
        return features
    if missing != MEAN:
        row, column = np.argwhere(bad)[0]
        raise DataError(
            f"--encoder {text}: {int(bad.sum())} values are not finite, first patch {patches.ids[row]!r}, column "
            f"{column}: correct them, or pass --missing mean (the mean of the training part)"
        )
    return np.where(bad, np.nan, features)
