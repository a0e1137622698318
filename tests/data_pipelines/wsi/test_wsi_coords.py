"""Coordinate files: as TRIDENT reads them, equal bytes for equal tiles; foreign ones of TRIDENT and CLAM."""

import dataclasses
import sys

import feature_folders as folders
import h5py
import numpy as np
import pytest

from data_pipelines.errors import DataError, StorageError
from data_pipelines.importers import reading
from data_pipelines.importers import trident as trident_layout
from data_pipelines.importers.sources import Options
from data_pipelines.wsi.coords import TileGrid, coords_file, read_coords, write_coords

COORDS = np.array([[0, 0], [561, 0], [1122, 561]], np.int32)
GRID = TileGrid(
    slide_id="Schnitt Ä.1.2",
    coords=COORDS,
    patch_size=256,
    patch_size_level0=561,
    mpp=0.5,
    magnification=20.0,
    level0_mpp=0.2281750559,
    overlap=32,
    level0_width=3968,
    level0_height=4864,
    slide_file="sub/Schnitt Ä.1.2.ndpi",
    rejected={"background": 7, "ink": 0},
)


def test_a_written_file_is_read_back_whole(tmp_path):
    path = coords_file(tmp_path, GRID)
    assert path.relative_to(tmp_path).as_posix() == "20x_256px_32px_overlap/patches/Schnitt Ä.1.2_patches.h5"
    write_coords(path, GRID)
    found = read_coords(path)
    np.testing.assert_array_equal(found.coords, COORDS, strict=True)
    for field in dataclasses.fields(GRID):
        if field.name != "coords":
            assert getattr(found, field.name) == getattr(GRID, field.name), field.name
    assert len(found) == 3 and found.overlap_level0 == 70


def test_attributes_are_tridents(tmp_path):
    """Names and types of field notes 3.1; TRIDENT computes the size at level 0 from the two magnifications."""
    write_coords(tmp_path / "job" / "patches" / "s_patches.h5", GRID)
    with h5py.File(tmp_path / "job" / "patches" / "s_patches.h5") as file:
        data, attrs = file["coords"], dict(file["coords"].attrs)
        assert data.dtype == np.int64 and data.maxshape == (None, 2)
    names = {"patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap", "name"}
    assert names | {"savetodir", "level0_width", "level0_height"} <= set(attrs)
    assert attrs["target_magnification"] == 20 and np.issubdtype(attrs["target_magnification"].dtype, np.integer)
    assert round(256 * attrs["level0_magnification"] / attrs["target_magnification"]) == 561
    assert attrs["name"] == GRID.slide_id and attrs["savetodir"] == "job"


def test_equal_tiles_are_equal_bytes_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "job" / "patches" / "s_patches.h5"
    write_coords(path, GRID)
    first = path.read_bytes()
    assert [item.name for item in path.parent.iterdir()] == ["s_patches.h5"]
    path.unlink()
    write_coords(path, dataclasses.replace(GRID, coords=COORDS.astype(np.int64)))
    assert path.read_bytes() == first


def test_no_tiles_are_a_file_too(tmp_path):
    write_coords(tmp_path / "s_patches.h5", dataclasses.replace(GRID, coords=np.zeros((0, 2), np.int32)))
    assert read_coords(tmp_path / "s_patches.h5").coords.shape == (0, 2)


def test_import_takes_size_and_magnification_from_the_file(tmp_path):
    """A folder of features of another program beside our coordinates imports as TRIDENT's."""
    grid = dataclasses.replace(GRID, slide_id="TCGA-AA-0001", patch_size_level0=512, overlap=0)
    write_coords(coords_file(tmp_path, grid), grid)
    folder = tmp_path / "20x_256px_0px_overlap" / "features_uni"
    folders.tensor_pt(folder / "TCGA-AA-0001.pt", np.ones((3, 8), np.float32))
    (source,) = trident_layout.find(tmp_path, Options())
    facts = reading.inspect(tmp_path, trident_layout, source, Options())
    assert (facts.patch_size, facts.patch_size_level0, facts.magnification, facts.n_patches) == (256, 512, 20, 3)
    assert facts.level0_magnification == 40 and facts.overlap == 0
    _, coords = reading.read(tmp_path, source, facts, "level0", None)
    np.testing.assert_array_equal(coords, COORDS)


def test_a_file_of_trident(tmp_path):
    folders.trident(tmp_path, {"S.1": folders.bag(0, n=5)})
    found = read_coords(tmp_path / "20x_256px_0px_overlap" / "features_uni_v1" / "S.1.h5")
    assert (found.slide_id, found.patch_size, found.patch_size_level0, found.magnification) == ("S.1", 256, 512, 20)
    assert (found.level0_width, found.level0_height, found.mpp, found.level0_mpp) == (99_000, 98_000, None, None)
    np.testing.assert_array_equal(found.coords, folders.bag(0, n=5)[1])


def test_a_file_of_clam(tmp_path):
    facts = {"patch_size": 256, "patch_level": 1, "downsample": (2.0, 2.0), "level_dim": (500, 400), "name": "S"}
    path = folders.h5(tmp_path / "S.h5", {"coords": COORDS.astype(np.int64)[None]}, {"coords": facts})
    found = read_coords(path)
    assert (found.slide_id, found.patch_size, found.patch_size_level0) == ("S", 256, 512)
    assert (found.level0_width, found.level0_height, found.magnification) == (1000, 800, None)
    np.testing.assert_array_equal(found.coords, COORDS)


def test_a_legacy_file_with_a_downsample_of_the_user(tmp_path):
    facts = {"patch_size": 256, "patch_level": 0, "custom_downsample": 2}
    found = read_coords(folders.h5(tmp_path / "a.b.h5", {"coords": COORDS}, {"coords": facts}))
    assert (found.slide_id, found.patch_size_level0) == ("a.b", 512)


@pytest.mark.parametrize(
    ("arrays", "attrs", "named"),
    [
        ({"features": np.ones((2, 2))}, {}, "no array 'coords'"),
        ({"coords": COORDS}, {}, "patch_size of coords is None"),
        ({"coords": COORDS}, {"patch_size": 256, "patch_level": 2}, "neither patch_size_level0"),
        ({"coords": COORDS + 0.5}, {"patch_size": 256, "patch_size_level0": 512}, "no whole numbers"),
        ({"coords": -COORDS}, {"patch_size": 256, "patch_size_level0": 512}, "no whole numbers"),
        ({"coords": np.full((1, 2), 2**40)}, {"patch_size": 256, "patch_size_level0": 512}, "too large"),
        ({"coords": np.ones((3, 3))}, {"patch_size": 256, "patch_size_level0": 512}, r"expected \[n, 2\]"),
    ],
)
def test_files_that_do_not_say_enough_are_refused_by_name(tmp_path, arrays, attrs, named):
    path = folders.h5(tmp_path / "bad.h5", arrays, {"coords": attrs} if "coords" in arrays else {})
    with pytest.raises(DataError, match=named) as caught:
        read_coords(path)
    assert "bad.h5" in str(caught.value)


def test_a_file_that_is_no_hdf5_is_refused_by_name(tmp_path):
    (tmp_path / "bad.h5").write_bytes(b"nothing")
    with pytest.raises(DataError, match="bad.h5"):
        read_coords(tmp_path / "bad.h5")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"coords": COORDS.astype(float)}, "expected integers"),
        ({"coords": COORDS - 1}, "outside the slide"),
        ({"coords": COORDS + 4000}, "outside the slide"),
        ({"overlap": 256}, "overlap < patch_size"),
    ],
)
def test_bad_grids_are_not_written(tmp_path, change, named):
    with pytest.raises(DataError, match=named):
        write_coords(tmp_path / "s_patches.h5", dataclasses.replace(GRID, **change))
    assert not (tmp_path / "s_patches.h5").exists()


@pytest.mark.parametrize("slide_id", ["../evil", "a/b", "..", "a\\b", " padded", "line\nbreak", ""])
def test_an_id_that_leaves_the_folder_is_refused(tmp_path, slide_id):
    with pytest.raises(DataError, match="path separators"):
        coords_file(tmp_path, dataclasses.replace(GRID, slide_id=slide_id))


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="writing .* failed"):
        write_coords(tmp_path / "file" / "patches" / "s_patches.h5", GRID)


def test_without_h5py_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r"pip install 'histokd_jax\[import\]'"):
        write_coords(tmp_path / "s_patches.h5", GRID)
