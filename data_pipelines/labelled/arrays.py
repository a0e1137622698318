"""Arrays of labelled patches in one .npz: images or feature arrays, with labels; and feature arrays alone.

| array                                   | meaning                                                       |
|-----------------------------------------|---------------------------------------------------------------|
| label, labels or y                      | [n] class index, or class name                                |
| class_names                             | [C] names of the indices                                      |
| id, ids or example_id                   | [n] keys; default: the number of the row                      |
| group, groups or case_id                | [n] slide or patient, empty if unknown                        |
| part or split                           | [n] train, val or test                                        |
| order or source_row                     | [n] place in the published file; folds are then blocks of it  |
| image or images                         | [n, H, W, 3] uint8                                            |
| any other array [n, D]                  | features under its name                                       |
"""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.labelled.patches import REFUSE, SHOWN, LabelledPatches, Row, columns, digest_of, kept_rows

_NAMES = {
    "label": ("label", "labels", "y"),
    "id": ("id", "ids", "example_id"),
    "group": ("group", "groups", "case_id"),
    "part": ("part", "split"),
    "order": ("order", "source_row"),
    "image": ("image", "images"),
    "class_names": ("class_names",),
}
_RESERVED = frozenset(name for names in _NAMES.values() for name in names)
_UNLABELLED = ("", "-1", "nan")


def read_arrays(path: pathlib.Path, *, unlabelled: str = REFUSE, classes: Sequence[str] = ()) -> LabelledPatches:
    """Reads a labelled .npz.

    Args:
      path: the file, see above.
      unlabelled: see `patches.kept_rows`; an index of -1 and an empty name are no label.
      classes: see `patches.columns`; default: class_names of the file.

    Returns:
      The patches.

    Raises:
      DataError: not readable, no labels, arrays of other lengths, neither images nor features, or see `patches`.
    """
    path = pathlib.Path(path)
    stored = load_npz(path)
    label = _one(stored, "label")
    if label is None:
        raise DataError(f"{path}: no array {' or '.join(_NAMES['label'])}; the file has {sorted(stored)}")
    if label.ndim != 1 or not len(label):
        raise DataError(f"{path}: the labels have the shape {label.shape}, expected [n]")
    n, names = len(label), _one(stored, "class_names")
    texts = _label_texts(label, names, path)
    cells = {what: _texts(stored, what, n, path) for what in ("id", "group", "part")}
    ids = cells["id"] or [str(row) for row in range(n)]
    none = [""] * n
    rows = [Row(*row) for row in zip(ids, texts, cells["group"] or none, cells["part"] or none)]
    kept, note = kept_rows(rows, str(path), unlabelled)
    features = {k: v for k, v in stored.items() if k not in _RESERVED and v.ndim == 2 and v.dtype.kind in "fiu"}
    features = {k: _checked_features(v, n, f"{path}, array {k}")[kept] for k, v in features.items()}
    images = _images(stored, n, path)
    if images is None and not features:
        raise DataError(f"{path}: neither images [n, H, W, 3] nor feature arrays [n, D]; the file has {sorted(stored)}")
    images = None if images is None else images[kept]
    order = _one(stored, "order")
    own = () if names is None else tuple(map(str, names))
    return LabelledPatches(
        name=path.stem,
        **columns([rows[i] for i in kept], str(path), classes or own),
        digest=tuple(_digest(images, features, row) for row in range(len(kept))),
        order=None if order is None else _order(order, n, path)[kept],
        arrays=features,
        read=None if images is None else images.__getitem__,
        notes=note,
    )


def read_features(path: pathlib.Path, array: str = "", ids: Sequence[str] = ()) -> np.ndarray:
    """One feature array for given patches.

    Args:
      path: .npy [n, D], or .npz.
      array: its name in the .npz; empty: "features", or the only one.
      ids: of the patches; an .npz with ids is put into their order, other files must have their rows.

    Returns:
      float32 [n, D].

    Raises:
      DataError: not readable, ambiguous, other rows, or patches without features.
    """
    path = pathlib.Path(path)
    if path.suffix == ".npy":
        if array:
            raise DataError(f"{path}: a .npy file holds one array without a name: leave ':{array}' out")
        return _checked_features(_load_npy(path), len(ids), str(path))
    stored = load_npz(path)
    name = _chosen(stored, array, path)
    own = _one(stored, "id")
    if own is None:
        return _checked_features(stored[name], len(ids), f"{path}, array {name}")
    place = {str(key): row for row, key in enumerate(own)}
    missing = [key for key in ids if key not in place]
    if missing:
        raise DataError(f"{path}: no features for {len(missing)} of {len(ids)} patches, first {missing[:SHOWN]}")
    values = _checked_features(stored[name], len(own), f"{path}, array {name}")
    return values[[place[key] for key in ids]]


def load_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of a file; nothing pickled is read.

    Raises:
      DataError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as .npz without pickled objects ({error})") from error


def _load_npy(path: pathlib.Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as .npy without pickled objects ({error})") from error


def _one(stored: Mapping[str, np.ndarray], what: str) -> np.ndarray | None:
    return next((stored[name] for name in _NAMES[what] if name in stored), None)


def _label_texts(label: np.ndarray, names: np.ndarray | None, path: pathlib.Path) -> list[str]:
    if label.dtype.kind not in "iu":
        return ["" if str(value).lower() in _UNLABELLED else str(value) for value in label.tolist()]
    if names is None:
        return ["" if value < 0 else str(value) for value in label.tolist()]
    if label.max() >= len(names):
        row = int(label.argmax())
        raise DataError(f"{path}: row {row} has the label {label[row]}, class_names has {len(names)} names")
    return ["" if value < 0 else str(names[value]) for value in label.tolist()]


def _texts(stored: Mapping[str, np.ndarray], what: str, n: int, path: pathlib.Path) -> list[str]:
    found = _one(stored, what)
    if found is None:
        return []
    if found.shape != (n,):
        raise DataError(f"{path}: the array of {what}s has the shape {found.shape}, there are {n} labels")
    return [str(value) for value in found.tolist()]


def _order(order: np.ndarray, n: int, path: pathlib.Path) -> np.ndarray:
    if order.shape != (n,) or order.dtype.kind not in "iu":
        raise DataError(
            f"{path}: the order has the shape {order.shape} and type {order.dtype}, expected [{n}] integers"
        )
    return order.astype(np.int64)


def _images(stored: Mapping[str, np.ndarray], n: int, path: pathlib.Path) -> np.ndarray | None:
    found = _one(stored, "image")
    if found is None:
        return None
    if found.dtype != np.uint8 or found.ndim != 4 or found.shape[3] != 3 or len(found) != n:
        raise DataError(f"{path}: images are {found.dtype} {found.shape}, expected uint8 [{n}, H, W, 3]")
    return found


def _chosen(stored: Mapping[str, np.ndarray], array: str, path: pathlib.Path) -> str:
    names = [name for name, value in stored.items() if name not in _RESERVED and value.ndim == 2]
    if array in names:
        return array
    if not array and ("features" in names or len(names) == 1):
        return "features" if "features" in names else names[0]
    asked = f"no feature array {array!r}" if array else "several feature arrays; say which, FILE.npz:NAME"
    raise DataError(f"{path}: {asked}; the file has {sorted(names)}")


def _checked_features(values: np.ndarray, n: int, where: str) -> np.ndarray:
    if values.ndim != 2 or values.dtype.kind not in "fiu" or not values.shape[1]:
        raise DataError(f"{where}: {values.dtype} {values.shape} are no features, expected numbers [n, D]")
    if len(values) != n:
        raise DataError(f"{where}: {len(values)} rows of features for {n} patches; rows must be those of the patches")
    return values.astype(np.float32)


def _digest(images: np.ndarray | None, features: Mapping[str, np.ndarray], row: int) -> str:
    if images is not None:
        return digest_of(images[row].tobytes())
    return digest_of(*(features[name][row].tobytes() for name in sorted(features)))
