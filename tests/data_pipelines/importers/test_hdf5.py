"""Reading many small chunks at once equals reading them through h5py, for every way in which they may be stored."""

import h5py
import numpy as np
import pytest

from data_pipelines.importers import hdf5

ROWS = np.random.default_rng(0).normal(size=(70, 6)).astype(np.float32)


@pytest.mark.parametrize(
    ("options", "direct"),
    [
        ({"chunks": (1, 6)}, True),
        ({"chunks": (3, 6), "maxshape": (None, 6)}, True),
        ({"chunks": (1, 6), "dtype": ">f4"}, True),
        ({"chunks": (1, 6), "dtype": "f2"}, True),
        ({"chunks": (1, 3)}, False),
        ({"chunks": (32, 6)}, False),
        ({"chunks": (1, 6), "compression": "gzip"}, False),
        ({"chunks": (1, 6), "fletcher32": True}, False),
        ({}, False),
    ],
)
def test_equals_h5py(tmp_path, options, direct):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file.create_dataset("x", data=ROWS.astype(options.get("dtype", "f4")), **options)
    with h5py.File(tmp_path / "f.h5") as file:
        found = hdf5.read_dataset(file["x"], tmp_path / "f.h5")
        np.testing.assert_array_equal(found, file["x"][()], strict=True)
        assert (hdf5._row_chunks(file["x"]) is not None) == direct


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_rows_written_out_of_order_appended_or_never(tmp_path, libver):
    with h5py.File(tmp_path / "f.h5", "w", libver=libver) as file:
        for name, n in (("grown", 10), ("holes", 70)):
            file.create_dataset(name, shape=(n, 6), maxshape=(None, 6), chunks=(1, 6), dtype="f4", fillvalue=7)
        other = file.create_dataset("other", shape=(70, 6), chunks=(1, 6), dtype="f4")
        file["grown"].resize(70, 0)
        for row in np.random.default_rng(1).permutation(70):
            file["grown"][row] = ROWS[row]
            other[row] = -ROWS[row]
        file["holes"][::2] = ROWS[::2]
    with h5py.File(tmp_path / "f.h5") as file:
        for name in ("grown", "holes", "other"):
            np.testing.assert_array_equal(hdf5.read_dataset(file[name], tmp_path / "f.h5"), file[name][()], strict=True)
        assert hdf5._row_chunks(file["grown"]) is not None and hdf5._row_chunks(file["holes"]) is None


def test_shrunk_and_with_a_user_block(tmp_path):
    with h5py.File(tmp_path / "f.h5", "w", userblock_size=512) as file:
        file.create_dataset("x", data=ROWS, chunks=(1, 6))
    with h5py.File(tmp_path / "g.h5", "w") as file:
        file.create_dataset("x", data=ROWS, chunks=(1, 6), maxshape=(None, 6)).resize(30, 0)
    for name, n in (("f.h5", 70), ("g.h5", 30)):
        with h5py.File(tmp_path / name) as file:
            np.testing.assert_array_equal(hdf5.read_dataset(file["x"], tmp_path / name), ROWS[:n], strict=True)
