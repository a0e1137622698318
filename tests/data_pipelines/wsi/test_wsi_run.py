"""From slides to coordinates, tables, outlines and previews; equal bytes after a kill and for any number of workers."""

import csv
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import wsi_slides as slides
from scipy import ndimage

from data_pipelines import table_files
from data_pipelines.errors import DataError, DatasetExistsError, StorageError
from data_pipelines.wsi import run, tiling
from data_pipelines.wsi.coords import read_coords
from data_pipelines.wsi.grid import TileOptions
from data_pipelines.wsi.slide import open_slide
from data_pipelines.wsi.sources import SlideSource, find_slides
from data_pipelines.wsi.tiling import TilingOptions, tile_slide
from data_pipelines.wsi.tissue import NoTissue, TissueOptions

pytest.importorskip("openslide")

ROOT = pathlib.Path(__file__).parents[3]
SMALL = TilingOptions(TileOptions(mpp=1.0, patch_size=64), TissueOptions(min_area_um2=5000))
IDS = ["a.1", "b", "Schnitt Ä"]
HEIGHT, WIDTH = 1400, 1800


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three slides with tissue, one empty, one without mpp, one that is none."""
    root = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(IDS):
        slides.with_tissue(root / f"{name}.tiff", seed, height=700, width=900)
    slides.write(root / "empty.tif", slides.glass(700, 900))
    slides.with_tissue(root / "unknown.tif", 0, height=700, width=900, mpp=None)
    (root / "broken.svs").write_bytes(b"no slide" * 100)
    return root


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An uninterrupted run in this process."""
    out = tmp_path_factory.mktemp("whole")
    return out, tile(folder, out)


def tile(folder, out, options=SMALL, **more):
    return run.run_tiling(folder, find_slides(folder), out, options, **more)


def digests(out):
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def one(tmp_path, rgb, options=SMALL, **written):
    slides.write(tmp_path / "s.tiff", rgb, **written)
    return tile_slide(tmp_path, SlideSource("s", "s.tiff"), options)


def test_every_slide_is_tiled_or_in_quarantine_with_its_reason(whole):
    out, outcome = whole
    assert [row["slide_id"] for row in outcome.rows] == sorted(IDS)
    reasons = {row["slide_id"]: row["reason"] for row in outcome.rejected}
    assert reasons == {"broken": "unreadable", "empty": "no tissue", "unknown": "no mpp"}
    with open(outcome.folder / "quarantine.csv", encoding="utf-8", newline="") as file:
        assert {row["slide_id"]: row["reason"] for row in csv.DictReader(file)} == reasons
    names = set(digests(outcome.folder))
    for name in IDS:
        assert {f"patches/{name}_patches.h5", f"contours_geojson/{name}.geojson", f"previews/{name}.png"} <= names
    outputs = [name for name in names if "/" in name and not name.startswith(".tiling/")]
    assert len(outputs) == 3 * len(IDS), "nothing for the slides in quarantine"


def test_counts_of_a_slide_add_up(whole):
    for row in whole[1].rows:
        grid = read_coords(whole[1].folder / "patches" / f"{row['slide_id']}_patches.h5")
        rejected = {reason: row[reason] for reason in ("background", "ink", "black", "blurred", "edge")}
        assert row["n_grid"] == row["n_tiles"] + sum(rejected.values())
        assert len(grid) == row["n_tiles"] > 10 and grid.rejected == rejected
        assert (row["mpp_source"], row["patch_size_level0"], row["tile_mpp"]) == ("slide", 128, 1.0)


def test_coordinates_are_those_of_the_painted_tissue(whole):
    """Reference: the share of the painted ellipse in every position of the grid, counted pixel by pixel."""
    painted = slides.ellipse(700, 900, (450, 350), (300, 700 / 3))
    starts = [(x, y) for y in range(0, 640, 128) for x in range(0, 800, 128)]
    shares = {(x, y): painted[y : y + 128, x : x + 128].mean() for x, y in starts if x + 128 <= 900 and y + 128 <= 700}
    for name in IDS:
        grid = read_coords(whole[1].folder / "patches" / f"{name}_patches.h5")
        kept = set(map(tuple, grid.coords.tolist()))
        assert kept <= set(shares) and len(kept) == len(grid)
        assert {at for at, share in shares.items() if share > 0.6} <= kept
        assert not {at for at, share in shares.items() if share < 0.4} & kept
        assert (grid.level0_width, grid.level0_height, grid.slide_file) == (900, 700, f"{name}.tiff")


def test_outlines_are_level_0_pixels(whole):
    found = json.loads((whole[1].folder / "contours_geojson" / "b.geojson").read_text())
    points = np.array(found["features"][0]["geometry"]["coordinates"][0])
    np.testing.assert_allclose(points.min(0), [150, 350 - 700 / 3], atol=25)
    np.testing.assert_allclose(points.max(0), [750, 350 + 700 / 3], atol=25)


def test_previews_are_pictures_of_the_slide(whole):
    from PIL import Image

    with Image.open(whole[1].folder / "previews" / "a.1.png") as image:
        assert image.width >= 480 and image.height > 300 and image.mode == "RGB"
        shown = np.asarray(image)
    assert (shown == (0, 140, 60)).all(axis=-1).sum() > 500, "the outline of the tissue"


def test_any_pyramid_gives_the_same_tiles(tmp_path):
    rgb = slides.stain(slides.glass(700, 900), slides.ellipse(700, 900, (450, 350), (300, 230)))
    found = [one(tmp_path / str(levels), rgb, levels=levels).tiles for levels in (1, 2, 3)]
    assert all(np.array_equal(found[0].coords, other.coords) for other in found[1:])


@pytest.mark.parametrize(("mpp", "level0"), [(0.5, 128), (0.25, 256), (0.45, 142), (0.505, 128), (1.0, 64)])
def test_tiles_have_the_wanted_size_on_glass(tmp_path, mpp, level0):
    rgb = slides.stain(slides.glass(700, 900), slides.ellipse(700, 900, (450, 350), (300, 230)))
    options = TilingOptions(SMALL.tiles, TissueOptions(min_area_um2=1000))
    found = one(tmp_path, rgb, options, mpp=mpp).tiles
    assert found.patch_size_level0 == level0 and (found.coords % level0 == 0).all()


def test_overlap_makes_more_tiles_at_the_right_distance(tmp_path):
    rgb = slides.stain(slides.glass(700, 900), slides.ellipse(700, 900, (450, 350), (300, 230)))
    options = TilingOptions(TileOptions(mpp=1.0, patch_size=64, overlap=16), SMALL.tissue)
    found = one(tmp_path, rgb, options)
    assert (found.tiles.coords % 96 == 0).all() and found.tiles.overlap_level0 == 32
    assert len(found.tiles) > 1.5 * len(one(tmp_path, rgb).tiles)


def test_a_given_mpp_serves_slides_without_one_and_only_those(tmp_path):
    rgb = slides.stain(slides.glass(700, 900), slides.ellipse(700, 900, (450, 350), (300, 230)))
    given = TilingOptions(SMALL.tiles, SMALL.tissue, mpp=0.25)
    assert one(tmp_path / "a", rgb, given, mpp=None).row["mpp_source"] == "--mpp"
    found = one(tmp_path / "b", rgb, given, mpp=0.5)
    assert (found.row["mpp_source"], found.row["level0_mpp"]) == ("slide", 0.5)
    by_table = tile_slide(tmp_path / "b", SlideSource("s", "s.tiff", 1.0), given)
    assert (by_table.row["mpp_source"], by_table.row["level0_mpp"]) == ("table", 1.0)


@pytest.mark.parametrize(
    ("written", "options", "reason", "named"),
    [
        ({"mpp": None}, SMALL, "no mpp", "--mpp"),
        ({"mpp": 0.5, "mpp_y": 0.6}, SMALL, "pixels not square", "0.5 x 0.6"),
        ({"mpp": 2.0}, SMALL, "too coarse", "--target-mpp"),
        ({}, TilingOptions(TileOptions(mpp=0.5, patch_size=1024)), "no tiles", "edge|background"),
    ],
)
def test_slides_that_cannot_be_tiled_say_why(tmp_path, written, options, reason, named):
    rgb = slides.stain(slides.glass(700, 900), slides.ellipse(700, 900, (450, 350), (300, 230)))
    with pytest.raises(NoTissue, match=named) as caught:
        one(tmp_path, rgb, options, **written)
    assert caught.value.reason == reason


def test_slightly_oblong_pixels_are_their_mean(tmp_path):
    rgb = slides.stain(slides.glass(700, 900), slides.ellipse(700, 900, (450, 350), (300, 230)))
    assert one(tmp_path, rgb, mpp=0.5, mpp_y=0.51).tiles.level0_mpp == pytest.approx(0.505, rel=1e-4)


def test_defocused_tissue_is_left_out_and_counted(tmp_path):
    mask = slides.box(HEIGHT, WIDTH, 256, 256, 1536, 1152)
    sharp = slides.stain(slides.glass(HEIGHT, WIDTH), mask)
    soft = slides.stain(slides.glass(HEIGHT, WIDTH), mask, blur=8)
    rgb = np.where(slides.box(HEIGHT, WIDTH, 1024, 0, WIDTH, HEIGHT)[..., None], soft, sharp)
    found = one(tmp_path, rgb)
    judged = found.candidates
    right = judged.coords[:, 0] >= 1024
    tissue = np.isin(judged.verdict, ["", "blurred"])
    assert (judged.verdict[right & tissue] == "blurred").mean() > 0.8
    assert (judged.verdict[~right & tissue] == "").all()
    assert found.tiles.rejected["blurred"] == (judged.verdict == "blurred").sum() > 10
    keep = TilingOptions(TileOptions(mpp=1.0, patch_size=64, sharpness=0), SMALL.tissue)
    assert one(tmp_path, rgb, keep).tiles.rejected["blurred"] == 0


def test_pen_and_black_border_on_a_slide_are_counted(tmp_path):
    mask = slides.box(HEIGHT, WIDTH, 300, 300, 1500, 1100)
    rgb = slides.stain(slides.glass(HEIGHT, WIDTH), mask)
    rgb[600:760] = (30, 120, 60)
    rgb[:, 1300:] = 0
    found = one(tmp_path, ndimage.gaussian_filter(rgb, (1, 1, 0)))
    corners = found.tiles.coords
    assert found.tiles.rejected["ink"] > 5 and found.tiles.rejected["black"] > 3
    assert not ((corners[:, 1] < 760) & (corners[:, 1] + 128 > 600 + 13)).any() and (corners[:, 0] + 128 < 1350).all()


def test_repetition_changes_nothing(folder, whole, tmp_path):
    tile(folder, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "lock"}
    again = tile(folder, tmp_path)
    assert again.kept == 6 and again.done == 0 and again.rows == whole[1].rows and again.rejected == whole[1].rejected
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert digests(tmp_path) == digests(whole[0])


def test_the_number_of_workers_does_not_matter(folder, whole, tmp_path):
    assert tile(folder, tmp_path, workers=2).done == 6
    assert digests(tmp_path) == digests(whole[0])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("writes", [1, 3, 5, 9, 13])
def test_an_interrupted_run_ends_in_the_same_bytes(folder, whole, tmp_path, monkeypatch, writes):
    count = 0
    replace = os.replace

    def failing(source, target):
        nonlocal count
        count += 1
        if count > writes:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(Killed):
            tile(folder, tmp_path)
    assert list(tmp_path.rglob(".writing-*"))
    outcome = tile(folder, tmp_path)
    assert outcome.done < 6 or writes < 4
    assert digests(tmp_path) == digests(whole[0]) and not list(tmp_path.rglob(".writing-*"))


@pytest.mark.slow
def test_kill_9_and_rerun_with_workers(folder, whole, tmp_path):
    code = (
        "import sys; from histokd_jax.cli.main import main; sys.exit(main(['tile', sys.argv[1], '--out', sys.argv[2],"
        "'--target-mpp', '1', '--tile-px', '64', '--min-area', '5000', '--workers', '2']))"
    )
    for delay in (1.0, 1.6, 2.2):
        command = [sys.executable, "-c", code, str(folder), str(tmp_path)]
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(1.2)  # the workers end themselves
    tile(folder, tmp_path)
    assert digests(tmp_path) == digests(whole[0])


def test_a_cohort_may_grow_and_a_changed_slide_is_done_again(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    slides.with_tissue(root / "a.tiff", 0, height=700, width=900)
    tile(root, out)
    slides.with_tissue(root / "b.tiff", 1, height=700, width=900)
    grown = tile(root, out)
    assert (grown.kept, grown.done) == (1, 1) and [row["slide_id"] for row in grown.rows] == ["a", "b"]
    (root / "a.tiff").write_bytes(b"damaged now")
    damaged = tile(root, out)
    assert [row["slide_id"] for row in damaged.rows] == ["b"] and damaged.rejected[0]["reason"] == "unreadable"
    assert not (damaged.folder / "patches" / "a_patches.h5").exists()
    (root / "a.tiff").unlink()
    assert tile(root, out).rejected == ()


def test_lost_outputs_are_made_again(tmp_path):
    slides.with_tissue(tmp_path / "in" / "a.tiff", 0, height=700, width=900)
    first = tile(tmp_path / "in", tmp_path / "out")
    (first.folder / "previews" / "a.png").unlink()
    assert tile(tmp_path / "in", tmp_path / "out").done == 1 and (first.folder / "previews" / "a.png").exists()


def test_tiles_of_other_options_are_not_mixed(tmp_path):
    slides.with_tissue(tmp_path / "in" / "a.tiff", 0, height=700, width=900)
    slides.with_tissue(tmp_path / "in" / "b.tiff", 0, height=700, width=900)
    tile(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "b.tiff").unlink()
    other = TilingOptions(TileOptions(mpp=1.0, patch_size=64, min_tissue=0.9), SMALL.tissue)
    with pytest.raises(DatasetExistsError, match=r"tiles.min_tissue 0.5, now 0.9.*--overwrite"):
        tile(tmp_path / "in", tmp_path / "out", other)
    fresh = tile(tmp_path / "in", tmp_path / "out", other, overwrite=True)
    assert [row["slide_id"] for row in fresh.rows] == ["a"]
    assert not (fresh.folder / "patches" / "b_patches.h5").exists()
    coarse = tile(tmp_path / "in", tmp_path / "out", TilingOptions(TileOptions(mpp=2.0, patch_size=32), SMALL.tissue))
    assert coarse.folder != fresh.folder and len(coarse.rows) == 1


def test_two_runs_into_one_folder_are_refused(folder, tmp_path):
    with run._locked(SMALL.folder(tmp_path)), pytest.raises(DataError, match="another process is tiling"):
        tile(folder, tmp_path)


def test_an_output_that_cannot_be_written_is_a_clear_error(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="check that the folder exists and is writable"):
        tile(folder, tmp_path / "file")


def test_a_full_disk_is_a_clear_error_and_the_run_can_be_continued(folder, whole, tmp_path, monkeypatch):
    def full(path, content):
        raise StorageError(28, f"writing {path} failed: No space left on device; free some space")

    with monkeypatch.context() as patch:
        patch.setattr(tiling.table_files, "write_bytes", full)
        with pytest.raises(StorageError, match="free some space"):
            tile(folder, tmp_path)
    assert table_files.write_bytes is not full
    tile(folder, tmp_path)
    assert digests(tmp_path) == digests(whole[0])


def test_files_open_in_pixels_of_the_slide(whole, folder):
    """A kept tile, read by its coordinates, is the painted tissue there."""
    from data_pipelines.wsi.slide import read_tile

    grid = read_coords(whole[1].folder / "patches" / "b_patches.h5")
    with open_slide(folder / grid.slide_file) as slide:
        for corner in grid.coords[::5]:
            tile_pixels = read_tile(slide, corner, grid.patch_size_level0, grid.patch_size)
            assert tile_pixels.shape == (64, 64, 3) and tile_pixels[..., 1].mean() < 210
