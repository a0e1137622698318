"""`histokd tile`: what it prints, its exit codes, and what other commands make of its files."""

import csv
import sys

import pytest
import wsi_slides as slides

from data_pipelines.wsi.coords import read_coords

pytest.importorskip("openslide")
SMALL = ("--target-mpp", 1, "--tile-px", 64, "--min-area", 5000, "--workers", 1)


@pytest.fixture
def folder(tmp_path):
    slides.with_tissue(tmp_path / "slides" / "sub" / "TCGA-AA-0001-01Z-00-DX1.1F.tiff", height=700, width=900)
    return tmp_path / "slides"


def test_tile_writes_everything_and_says_so(histokd, folder, tmp_path):
    shown = histokd("tile", folder, "--out", tmp_path / "job", *SMALL)
    assert shown.code == 0, shown.err
    assert "1 slides; tiles of 64 px at 1 um per pixel" in shown.out and "left out: " in shown.out
    made = tmp_path / "job" / "10x_64px_0px_overlap"
    with open(made / "tiles.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert f"1 slides, {row['n_tiles']} tiles" in shown.out and "quarantine" not in shown.out
    grid = read_coords(made / "patches" / "TCGA-AA-0001-01Z-00-DX1.1F_patches.h5")
    assert len(grid) == int(row["n_tiles"]) and grid.slide_file == "sub/TCGA-AA-0001-01Z-00-DX1.1F.tiff"
    again = histokd("tile", folder, "--out", tmp_path / "job", *SMALL)
    assert again.code == 0 and "(1 were done before)" in again.out


def test_quarantine_shows_in_exit_code_output_and_file(histokd, folder, tmp_path):
    slides.write(folder / "empty.tiff", slides.glass(700, 900))
    (folder / "zero.svs").touch()
    shown = histokd("tile", folder, "--out", tmp_path / "job", *SMALL)
    assert shown.code == 3 and "quarantine: 2 slides: 1 no tissue, 1 unreadable" in shown.out
    assert "zero.svs: unreadable: the slide file is empty" in shown.out
    assert not list(tmp_path.rglob("empty_patches.h5")), "no tissue never becomes a tile"


def test_nothing_to_tile_exits_with_1_and_leaves_the_reasons(histokd, tmp_path):
    slides.write(tmp_path / "in" / "empty.tiff", slides.glass(700, 900))
    shown = histokd("tile", tmp_path / "in", "--out", tmp_path / "job", *SMALL)
    assert shown.code == 1 and "none of 1 slides could be tiled" in shown.err
    assert "no tissue" in (tmp_path / "job" / "10x_64px_0px_overlap" / "quarantine.csv").read_text()


def test_a_slide_without_mpp_is_refused_with_the_way_out(histokd, tmp_path):
    slides.with_tissue(tmp_path / "in" / "s.tiff", height=700, width=900, mpp=None)
    shown = histokd("tile", tmp_path / "in", "--out", tmp_path / "job", *SMALL)
    assert shown.code == 1 and "no mpp: the slide does not record the size of its pixels; give --mpp" in shown.out
    shown = histokd("tile", tmp_path / "in", "--out", tmp_path / "job", *SMALL, "--mpp", 0.5)
    assert shown.code == 0, shown.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--mpp", "-1"), "--mpp -1.0"),
        (("--overlap", "64"), "tile option overlap is 64"),
        (("--workers", "0"), "--workers 0"),
        (("--threshold", "9"), "threshold"),
        (("--exclude", "*"), "1 were excluded"),
        (("--slides", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_bad_requests_are_one_clear_line(histokd, folder, tmp_path, arguments, named):
    shown = histokd("tile", folder, "--out", tmp_path / "job", *SMALL, *arguments)
    assert shown.code == 1 and named in shown.err and shown.err.startswith("histokd tile: ")
    assert not (tmp_path / "job").exists()


def test_other_bad_requests(histokd, folder, tmp_path, monkeypatch):
    shown = histokd("tile", tmp_path / "nowhere", "--out", tmp_path / "job")
    assert shown.code == 1 and "does not exist" in shown.err
    (tmp_path / "file").touch()
    shown = histokd("tile", folder, "--out", tmp_path / "file", *SMALL)
    assert shown.code == 1 and "writing" in shown.err
    (folder / "other").mkdir()
    (folder / "other" / "TCGA-AA-0001-01Z-00-DX1.1F.svs").touch()
    shown = histokd("tile", folder, "--out", tmp_path / "job", *SMALL)
    assert shown.code == 1 and "1 slide ids occur in several files" in shown.err
    monkeypatch.setitem(sys.modules, "openslide", None)
    shown = histokd("tile", folder, "--out", tmp_path / "job", *SMALL, "--exclude", "other/*")
    assert shown.code == 1 and "pip install 'histokd_jax[wsi]'" in shown.err
