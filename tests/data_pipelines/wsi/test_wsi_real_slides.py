"""Every real slide is tiled or refused for the right reason; its pixels are OpenSlide's."""

import json

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.wsi.coords import read_coords
from data_pipelines.wsi.run import run_tiling
from data_pipelines.wsi.slide import open_slide, read_tile
from data_pipelines.wsi.sources import find_slides
from data_pipelines.wsi.tiling import TilingOptions
from data_pipelines.wsi.tissue import TissueOptions

openslide = pytest.importorskip("openslide")
pytestmark = pytest.mark.real_data

CMU, TCGA, DAPI, DICOM = "CMU-1-Small-Region", "tcga-cr-7395-01a-01-ts1", "test3-DAPI-2-(387)", "small_dicom"
FILES = {CMU: f"{CMU}.svs", TCGA: f"{TCGA}.svs", DAPI: f"{DAPI}.ndpi", DICOM: f"{DICOM}.dcm"}


@pytest.fixture(scope="module")
def folder(real_data):
    return real_data / "wsi"


@pytest.fixture(scope="module")
def reference(folder):
    return json.loads((folder / "openslide_reference.json").read_text())


def tiled(folder, out, options):
    return run_tiling(folder, find_slides(folder), out, options)


@pytest.fixture(scope="module")
def outcome(folder, tmp_path_factory):
    return tiled(folder, tmp_path_factory.mktemp("plain"), TilingOptions())


@pytest.mark.parametrize("name", [CMU, TCGA, DAPI])
def test_headers_equal_the_reference(folder, reference, name):
    wanted = reference[FILES[name]]
    with open_slide(folder / FILES[name]) as slide:
        assert [list(size) for size in slide.level_dimensions] == wanted["level_dimensions"]
        np.testing.assert_allclose(slide.level_downsamples, wanted["level_downsamples"], atol=1e-6)
        assert slide.mpp == (wanted["mpp_x"] and pytest.approx(float(wanted["mpp_x"])))
        assert slide.objective_power == (wanted["objective_power"] and float(wanted["objective_power"]))


@pytest.mark.parametrize("name", [CMU, TCGA, DAPI])
def test_means_of_regions_equal_the_reference(folder, reference, name):
    with open_slide(folder / FILES[name]) as slide:
        for region in reference[FILES[name]]["regions"].values():
            tile = read_tile(slide, region["location"], 64, 64)
            np.testing.assert_allclose(tile.reshape(-1, 3).mean(axis=0), region["mean_rgb"], atol=5.1e-4)


def test_the_pixels_of_tiles_are_those_openslide_returns(folder, outcome):
    grid = read_coords(outcome.folder / "patches" / f"{CMU}_patches.h5")
    with open_slide(folder / grid.slide_file) as slide, openslide.OpenSlide(folder / grid.slide_file) as plain:
        for corner in grid.coords:
            wanted = np.asarray(plain.read_region(tuple(map(int, corner)), 0, (256, 256)))
            assert (wanted[..., 3] == 255).all()
            np.testing.assert_array_equal(read_tile(slide, corner, grid.patch_size_level0, 256), wanted[..., :3])


def test_the_pixels_of_another_level_are_those_openslide_returns(folder):
    with open_slide(folder / FILES[TCGA]) as slide, openslide.OpenSlide(folder / FILES[TCGA]) as plain:
        wanted = np.asarray(plain.read_region((1024, 512), 1, (256, 256)))[..., :3]
        np.testing.assert_array_equal(read_tile(slide, (1024, 512), 512, 256), wanted)


def test_every_slide_goes_through_or_is_refused_for_the_right_reason(outcome):
    reasons = {row["slide_id"]: (row["reason"], row["detail"]) for row in outcome.rejected}
    assert {name: reason for name, (reason, _) in reasons.items()} == {
        TCGA: "no mpp", DICOM: "unreadable", DAPI: "dark background"
    }  # fmt: skip
    assert "--mpp" in reasons[TCGA][1] and "Couldn't get image flavor" in reasons[DICOM][1]
    assert "fluorescence" in reasons[DAPI][1]
    (row,) = outcome.rows
    assert (row["slide_id"], row["patch_size_level0"], row["mpp_source"]) == (CMU, 256, "slide")
    assert row["n_tiles"] > 20 and row["ink"] == row["black"] == 0
    assert row["n_grid"] == 9 * 12 == row["n_tiles"] + sum(row[name] for name in ("background", "blurred", "edge"))


def test_the_slide_without_mpp_goes_through_with_a_given_one(folder, tmp_path):
    found = tiled(folder, tmp_path, TilingOptions(mpp=0.25))
    row = {row["slide_id"]: row for row in found.rows}[TCGA]
    assert (row["mpp_source"], row["patch_size_level0"]) == ("--mpp", 512) and row["n_tiles"] > 20
    assert row["ink"] + row["black"] <= 0.05 * row["n_grid"]


def test_the_fluorescence_slide_goes_through_on_request(folder, tmp_path):
    found = tiled(folder, tmp_path, TilingOptions(tissue=TissueOptions(mode="fluorescence")))
    row = {row["slide_id"]: row for row in found.rows}[DAPI]
    assert row["patch_size_level0"] == 561 and row["n_tiles"] >= 5


def test_the_dicom_file_is_refused_by_name(folder):
    with pytest.raises(DataError, match=r"small_dicom.dcm: OpenSlide cannot open it: Couldn't get image flavor"):
        open_slide(folder / FILES[DICOM])
