"""Opens labelled patches of any kind."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from data_pipelines.errors import DataError
from data_pipelines.labelled.arrays import read_arrays
from data_pipelines.labelled.folder import read_folder
from data_pipelines.labelled.pair_sets import IMAGE, read_pair_set
from data_pipelines.labelled.patches import REFUSE, LabelledPatches
from data_pipelines.manifest import MANIFEST_FILE


def open_patches(
    path: pathlib.Path, *, which: str = IMAGE, unlabelled: str = REFUSE, classes: Sequence[str] = ()
) -> LabelledPatches:
    """Opens a pair data set, a folder of images or a labelled .npz.

    Args:
      path: of the data.
      which: see `pair_sets.read_pair_set`; other data have images only.
      unlabelled: see `patches.kept_rows`.
      classes: the classes in their order; pair sets have their own.

    Returns:
      The patches.

    Raises:
      DataError: of another kind, or unusable; says why.
    """
    path = pathlib.Path(path)
    if (path / MANIFEST_FILE).exists():
        if classes:
            raise DataError(f"{path}: a pair data set has its own classes: leave --classes out")
        return read_pair_set(path, which=which, unlabelled=unlabelled)
    if which != IMAGE:
        raise DataError(f"--input {which} needs a pair data set (`histokd pairs`), {path} is none")
    if path.is_dir():
        return read_folder(path, unlabelled=unlabelled, classes=classes)
    if path.suffix == ".npz":
        return read_arrays(path, unlabelled=unlabelled, classes=classes)
    raise DataError(
        f"{path}: expected a pair data set, a folder of labelled images, or an .npz with labels"
        + ("" if path.exists() else "; it does not exist")
    )
