"""The classic multiple-instance benchmarks (Musk, Elephant, Fox) as bags, and as data sets of this library.

Sources: UCI Musk (Dietterich et al., 1997); Elephant, Fox and Tiger (Andrews et al., 2002). Two published layouts are
read: a CSV without header (bag label, bag id, features) and MATLAB files (X, Bag2, bagI).
"""

from __future__ import annotations

import dataclasses
import pathlib
import zlib
from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.io

from data_pipelines import table_files
from data_pipelines.errors import DataError
from data_pipelines.writer import DatasetWriter

TASK = "label"
"""Column of tables/labels.csv that holds the class of a bag."""


@dataclasses.dataclass(frozen=True, eq=False)
class MilBags:
    """Bags of instances with one label each.

    Attributes:
      name: e.g. "musk1".
      features: n arrays [instances, D] float64.
      label: [n] int32, 0 or 1.
      bag_id: n ids as the file has them.
    """

    name: str
    features: tuple[np.ndarray, ...]
    label: np.ndarray
    bag_id: tuple[str, ...]

    @property
    def feat_dim(self) -> int:
        """D."""
        return self.features[0].shape[1]


def read_csv(path: str | pathlib.Path) -> MilBags:
    """Reads the CSV layout: no header, column 0 the bag label (0 or 1), column 1 the bag id, then features.

    Args:
      path: the file, plain or compressed; its name up to the first dot is the name of the benchmark.

    Returns:
      Bags in the order of their first row.

    Raises:
      FileNotFoundError: no such file.
      DataError: a cell that is no finite number (with its line), a label other than 0 and 1, or a bag with two labels.
    """
    path = pathlib.Path(path)
    try:
        cells = pd.read_csv(path, header=None, dtype=str, keep_default_na=False).to_numpy()
    except (
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
        EOFError,
        OSError,
        zlib.error,
        UnicodeDecodeError,
    ) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DataError(f"{path}: no table of bags: {error}") from error
    if cells.shape[1] < 3:
        raise DataError(f"{path}: {cells.shape[1]} columns; expected bag label, bag id and features")
    values = pd.DataFrame(cells).apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    values[:, 1] = 0  # an id need not be a number
    _check_finite(values, cells, path)
    return _group(path.name.split(".")[0], values[:, 2:], values[:, 0], cells[:, 1], path)


def read_mat(folder: str | pathlib.Path, name: str) -> MilBags:
    """Reads the MATLAB layout: X.mat (X: instances x features), Bag2.mat (bag of each instance), BagI.mat (bag labels).

    Args:
      folder: folder of the three files.
      name: name of the benchmark.

    Returns:
      Bags in the order of their numbers.

    Raises:
      FileNotFoundError: a file is missing.
      DataError: a variable is missing, sizes disagree, a value is not finite, or a bag number has no label.
    """
    folder = pathlib.Path(folder)
    features = _variable(folder / "X.mat", "X").astype(np.float64)
    bag = _variable(folder / "Bag2.mat", "Bag2").reshape(-1).astype(np.int64)
    label = _variable(folder / "BagI.mat", "bagI").reshape(-1).astype(np.float64)
    if features.ndim != 2 or len(bag) != len(features):
        raise DataError(f"{folder}: X has shape {features.shape}, Bag2 has {len(bag)} entries: one per row is needed")
    if bag.min() < 1 or bag.max() > len(label):
        raise DataError(
            f"{folder}: Bag2 holds bag {bag.max()} (lowest {bag.min()}), BagI has labels of 1..{len(label)}"
        )
    _check_finite(features, features, folder / "X.mat")
    return _group(name, features, label[bag - 1], bag.astype(str), folder)


def _variable(path: pathlib.Path, name: str) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        content = scipy.io.loadmat(path)
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        raise DataError(f"{path}: not a MATLAB file that SciPy reads: {error}") from error
    if name not in content:
        raise DataError(f"{path}: variable {name!r} is missing; it holds {sorted(k for k in content if k[0] != '_')}")
    return content[name]


def _check_finite(values: np.ndarray, cells: np.ndarray, path: pathlib.Path) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        raise DataError(f"{path}, line {row + 1}, column {column}: {cells[row, column]!r} is no finite number")


def _group(name: str, features: np.ndarray, label: np.ndarray, bag: np.ndarray, path: pathlib.Path) -> MilBags:
    """Gathers rows by bag; the rows of a bag need not be neighbours."""
    ids, first, inverse = np.unique(bag.astype(str), return_index=True, return_inverse=True)
    order = np.argsort(first)
    rows = [np.flatnonzero(inverse == k) for k in order]
    for k, mine in zip(order, rows):
        if not np.isin(label[mine], (0, 1)).all() or len(np.unique(label[mine])) > 1:
            found = sorted(set(label[mine].tolist()))
            raise DataError(f"{path}: bag {str(ids[k])!r} has the labels {found}; one, 0 or 1, is expected")
    return MilBags(
        name,
        tuple(features[mine] for mine in rows),
        np.array([label[mine[0]] for mine in rows], np.int32),
        tuple(str(ids[k]) for k in order),
    )


def moments(bags: MilBags, training: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of every feature over the instances of the training bags.

    Args:
      bags: all bags.
      training: rows of the bags that may be looked at.

    Returns:
      ([D], [D]) float64; the deviation of a feature that is constant there is 1, so that it is only centred.
    """
    seen = np.concatenate([bags.features[row] for row in training])
    scale = seen.std(axis=0)
    return seen.mean(axis=0), np.where(scale > 0, scale, 1.0)


def write_dataset(directory: str | pathlib.Path, bags: MilBags, *, overwrite: bool = False) -> None:
    """Writes bags as a data set, float32, with tables/labels.csv (column `label`), for the ordinary trainer.

    Args:
      directory: target folder.
      bags: what to write; features are stored as they are, not standardised.
      overwrite: replace a complete data set.

    Raises:
      DatasetExistsError: the folder holds a complete data set.
      DataError: a bag that cannot be stored.
    """
    directory, case_ids = pathlib.Path(directory), [f"{bags.name}-{bag}" for bag in bags.bag_id]
    # The table first: a data set counts as complete from its manifest on.
    rows = list(zip(case_ids, bags.label))
    with DatasetWriter(
        directory,
        name=bags.name,
        feat_dim=bags.feat_dim,
        dtype="float32",
        notes="classic multiple-instance benchmark; instances, not image patches",
        overwrite=overwrite,
    ) as out:
        table_files.write_csv(directory / "tables" / "labels.csv", ("case_id", TASK), rows)
        for case_id, features in zip(case_ids, bags.features):
            out.add(case_id, case_id, features.astype(np.float32))
