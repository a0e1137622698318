"""Slides and coordinates become a data set: the right rows, the same bytes after a kill, faults in quarantine."""

import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import cohort
import numpy as np
import pytest
import tifffile
from cohort import COUNTS, coords_path, grid_of, make_plan, paint, tiny_encoder, trained, write_cohort

from data_pipelines import bag, planned_writer
from data_pipelines.errors import DataError, DatasetExistsError
from data_pipelines.importers.cases import CaseRule
from data_pipelines.manifest import Manifest
from data_pipelines.reader import BagReader
from data_pipelines.wsi.coords import read_coords, write_coords
from data_pipelines.wsi.slide import open_slide, read_tile
from histokd_jax.embed import plan, run, slides, transform
from histokd_jax.embed.embedder import Compute, Embedder
from histokd_jax.nn.encoders import build

ROOT = pathlib.Path(__file__).parents[2]
SLIDES = sorted(COUNTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    cohort.embed(folder, out)
    return out


def digests(out):
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def reasons(rejected):
    return {item.slide_id: item.reason for item in rejected}


def test_rows_are_the_embeddings_of_the_tiles_at_their_coordinates(folder, whole):
    loaded, reader = tiny_encoder(), BagReader(whole)
    assert [slide.slide_id for slide in reader.manifest.slides] == SLIDES
    for row, name in enumerate(SLIDES):
        grid = read_coords(coords_path(folder, name))
        with open_slide(folder / "slides" / f"{name}.tiff") as slide:
            tiles = np.stack([read_tile(slide, at, cohort.LEVEL0, cohort.PX) for at in grid.coords])
        images = transform.prepare(tiles, loaded.encoder.transform)
        expected = np.asarray(build.build(cohort.SPEC).apply(loaded.variables, images))
        features, coords = reader.read_bag(row)[:2]
        order = bag.permutation(0, name, len(tiles))
        np.testing.assert_array_equal(coords, grid.coords[order])
        np.testing.assert_allclose(features.astype(np.float32), expected[order], atol=4e-3)
        assert np.ptp(expected, axis=0).mean() > 0.05, "tiles must differ"


def test_the_manifest_says_what_the_embeddings_are(folder, whole):
    loaded, manifest = tiny_encoder(), Manifest.load(whole)
    encoder = manifest.encoder
    assert encoder["weights"] == "RANDOM, NOT TRAINED (seed 0)" and encoder["name"] == "tiny (random weights)"
    assert "UNTRAINED" in manifest.notes
    assert encoder["weights_sha256"] == loaded.sha256 and encoder["transform"]["resize"] == 30
    assert encoder["architecture"]["kind"] == "vit" and encoder["patch_size"] == cohort.PX
    assert (manifest.mpp, manifest.magnification, manifest.patch_size_level0) == (1.0, 10.0, cohort.LEVEL0)
    assert manifest.feat_dim == cohort.SPEC.features and manifest.simulated is False
    with open(whole / "sources.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["slide_id"] for row in rows] == SLIDES
    assert [int(row["count"]) for row in rows] == [COUNTS[name] for name in SLIDES]
    assert rows[0]["file"] == f"{SLIDES[0]}.tiff" and len(rows[0]["content"]) == 64 and rows[0]["level0_mpp"] == "0.5"
    text = (whole / "manifest.json").read_text() + (whole / "sources.csv").read_text()
    assert str(folder) not in text, "no folder of this machine"


def test_nothing_but_the_data_set_is_left_behind(whole):
    names = set(digests(whole))
    assert sum("array_record" in name for name in names) == 3
    assert {"manifest.json", "slides.csv", "sources.csv", "quarantine.csv"} <= names
    assert not [name for name in names if name.startswith(".") or name.endswith((".npy", ".png", ".jpg"))]


def test_opens_with_plain_tensorflow_datasets(whole):
    import tensorflow_datasets as tfds

    examples = tfds.builder_from_directory(str(whole)).as_data_source("train")
    assert len(examples) == sum(shard.n_records for shard in Manifest.load(whole).shards)
    assert examples[0]["slide_id"] in (SLIDES[0], SLIDES[0].encode())


# --- killed and repeated

SCRIPT = """
import sys, pathlib, time
import jax
jax.config.update("jax_num_cpu_devices", 8)
sys.path[:0] = sys.argv[3:]
import cohort
from histokd_jax.embed import run
if __name__ == "__main__":
    loaded = cohort.tiny_encoder()
    plan = cohort.make_plan(pathlib.Path(sys.argv[1]), loaded)
    run.run_embedding(plan, pathlib.Path(sys.argv[2]), cohort.embedder(loaded), threads=2,
                      progress=lambda n: (print("tiles", n, flush=True), time.sleep(0.05)))
"""


@pytest.mark.parametrize("steps", [3, 6])
def test_killed_embedding_resumes_to_the_same_bytes(folder, whole, tmp_path, steps):
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    paths = [str(ROOT / "tests" / "embed"), str(ROOT / "tests")]
    command = [sys.executable, str(script), str(folder), str(out), *paths]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        for _ in range(steps):
            assert process.stdout.readline()
        while not list((out / planned_writer.WORK_FOLDER).rglob("*.npy")):  # the first slide may still be on its way
            assert process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    assert not (out / "manifest.json").exists()
    assert (out / planned_writer.WORK_FOLDER).is_dir()
    done = []
    loaded = tiny_encoder()
    embedder = cohort.embedder(loaded)
    outcome = run.run_embedding(make_plan(folder, loaded), out, embedder, threads=2, progress=done.append)
    assert outcome.slides_kept >= 1, "finished slides are not embedded again"
    assert sum(done) == sum(COUNTS.values())
    assert digests(out) == digests(whole)


@pytest.mark.parametrize("moment", range(5))
def test_killed_at_any_slide_resumes_without_embedding_it_again(folder, whole, tmp_path, monkeypatch, moment):
    class Killed(BaseException):
        pass

    out, loaded = tmp_path / "out", tiny_encoder()
    saved, engine = [], cohort.embedder(loaded)
    save = run._Bags._save

    def save_some(self, index, features):
        if len(saved) == moment:
            raise Killed
        saved.append(index)
        save(self, index, features)

    with monkeypatch.context() as patch:
        patch.setattr(run._Bags, "_save", save_some)
        with pytest.raises(Killed):
            run.run_embedding(make_plan(folder, loaded), out, engine)
    again = []
    monkeypatch.setattr(
        run._Bags, "_save", lambda self, index, features: (again.append(index), save(self, index, features))
    )
    outcome = run.run_embedding(make_plan(folder, loaded), out, engine)
    assert outcome.slides_kept == moment and again == list(range(moment, len(COUNTS)))
    assert digests(out) == digests(whole)


def test_repetition_changes_nothing_and_another_encoder_does_not_overwrite(folder, whole, tmp_path):
    out = tmp_path / "out"
    cohort.embed(folder, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = cohort.embed(folder, out, compute={"dtype": "float32", "batch": 16})
    assert again.already_complete
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(DatasetExistsError, match="--overwrite"):
        cohort.embed(folder, out, tiny_encoder(seed=1))
    assert digests(out) == digests(whole)


def test_a_slide_that_changed_after_the_kill_is_embedded_again(tmp_path):
    folder = write_cohort(tmp_path / "c", dict(list(COUNTS.items())[:2]))
    loaded, name = tiny_encoder(), list(COUNTS)[0]
    made = make_plan(folder, loaded)
    with planned_writer.work_folder(tmp_path / "out") as work:
        bags = run._Bags(made, work, range(len(made.shards)), cohort.embedder(loaded), 2, 2, lambda n: None)
        assert [bags.next(i).slide_id for i in (0, 1)] == sorted(COUNTS)[:2]
    paint(folder / "slides", name, seed=99)
    outcome = run.run_embedding(make_plan(folder, loaded), tmp_path / "out", cohort.embedder(loaded))
    assert outcome.slides_kept == 1
    fresh = tmp_path / "fresh"
    run.run_embedding(make_plan(folder, loaded), fresh, cohort.embedder(loaded))
    assert digests(tmp_path / "out") == digests(fresh)


def test_number_of_devices_and_batch_change_embeddings_by_rounding_only(folder, whole, tmp_path):
    loaded = tiny_encoder()
    other = cohort.embedder(loaded, batch=5, devices=1)
    run.run_embedding(make_plan(folder, loaded, compute={"dtype": "float32", "batch": 5}), tmp_path / "o", other)
    for row in range(len(SLIDES)):
        a, b = (BagReader(out).read_bag(row)[0].astype(np.float32) for out in (whole, tmp_path / "o"))
        np.testing.assert_allclose(a, b, atol=4e-3)


# --- faults


def test_faulty_slides_go_to_quarantine_with_reasons(tmp_path):
    names = [f"TCGA-AA-000{i}-DX1" for i in range(9)]
    folder = write_cohort(tmp_path, dict.fromkeys(names, 4))
    place = folder / "slides"
    (place / f"{names[1]}.tiff").write_bytes(b"II*\0 this is no slide")
    (place / f"{names[2]}.tiff").unlink()
    coords_path(folder, names[3]).unlink()
    coords_path(folder, names[4]).write_bytes(b"")
    write_coords(coords_path(folder, names[5]), grid_of(names[5], 4, level0_width=777))
    write_coords(coords_path(folder, names[6]), dataclasses.replace(grid_of(names[0], 4)))
    write_coords(coords_path(folder, names[7]), grid_of(names[7], 0))
    damaged = (place / f"{names[8]}.tiff").read_bytes()
    (place / f"{names[8]}.tiff").write_bytes(bytes(8) + damaged[8 : len(damaged) // 3])
    outcome = cohort.embed(folder, tmp_path / "out")
    assert reasons(outcome.rejected) == {
        names[1]: "unreadable slide",
        names[2]: "slide missing",
        names[3]: "no coordinates",
        names[4]: "bad coordinates",
        names[5]: "coordinates of another slide",
        names[6]: "coordinates of another slide",
        names[7]: "no tiles",
        names[8]: "unreadable slide",
    }
    assert [slide.slide_id for slide in outcome.manifest.slides] == [names[0]]
    with open(tmp_path / "out" / "quarantine.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 9
    facts = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert facts["embed"]["n_quarantined"] == 8


def test_a_slide_damaged_in_its_tiles_goes_to_quarantine_alone(tmp_path):
    names = ["TCGA-AA-0001-DX1", "TCGA-AA-0002-DX1", "TCGA-AA-0003-DX1"]
    folder = write_cohort(tmp_path, dict.fromkeys(names, 20))
    path = folder / "slides" / f"{names[1]}.tiff"
    with tifffile.TiffFile(path) as file:  # level 1, from which tiles are read
        places = list(zip(file.pages[1].dataoffsets, file.pages[1].databytecounts))
    content = bytearray(path.read_bytes())
    for start, count in places:
        content[start : start + count] = bytes(count)
    path.write_bytes(content)
    outcome = cohort.embed(folder, tmp_path / "out")
    assert reasons(outcome.rejected) == {names[1]: "unreadable tile"}
    assert "restore it from a copy" in outcome.rejected[0].detail
    assert [slide.slide_id for slide in outcome.manifest.slides] == [names[0], names[2]]


def test_coordinates_beyond_a_slide_are_not_its_own(tmp_path):
    name = "TCGA-AA-0001-DX1"
    folder = write_cohort(tmp_path, {name: 4})
    paint(folder / "slides", name, height=60, width=500)
    foreign = grid_of(name, 10, level0_width=None, level0_height=None)
    write_coords(coords_path(folder, name), foreign)
    with pytest.raises(plan.NothingUsable, match=r"1 coordinates of another slide.*outside .* of 500 x 60 pixels"):
        make_plan(folder)


def test_a_cohort_without_any_usable_slide_leaves_no_data_set(tmp_path):
    folder = write_cohort(tmp_path, {"TCGA-AA-0001-DX1": 4})
    (folder / "slides" / "TCGA-AA-0001-DX1.tiff").write_bytes(b"")
    with pytest.raises(plan.NothingUsable, match="none of 1 slides can be embedded: 1 unreadable slide"):
        cohort.embed(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_weights_that_overflow_are_told_not_stored(tmp_path):
    folder = write_cohort(tmp_path, {"TCGA-AA-0001-DX1": 4, "TCGA-AA-0002-DX1": 4})
    loaded = tiny_encoder()
    loaded.variables["params"]["norm"]["scale"] = loaded.variables["params"]["norm"]["scale"] * 1e6
    with pytest.raises(plan.NothingUsable, match="2 not finite"):
        cohort.embed(folder, tmp_path / "out", loaded)


# --- resolution


def test_tiles_of_a_resolution_the_encoder_does_not_know_are_refused(folder):
    known = trained(tiny_encoder(mpp=(0.5,)))
    with pytest.raises(DataError, match=r"trained at 0.5 um per pixel, the tiles have 1: tile .* --mpp 0.5, or pass"):
        make_plan(folder, known)
    assert make_plan(folder, known, any_mpp=True).facts["encoder"]["mpp_not_checked"] is True
    make_plan(folder, trained(tiny_encoder(mpp=(0.25, 1.05))))
    make_plan(folder, tiny_encoder(mpp=(0.5,)))  # random weights know no resolution


def test_a_resolution_that_the_slide_contradicts_goes_to_quarantine(tmp_path):
    name = "TCGA-AA-0001-DX1"
    folder = write_cohort(tmp_path, {name: 4})
    write_coords(coords_path(folder, name), grid_of(name, 4, mpp=None, magnification=20.0, level0_mpp=None))
    with pytest.raises(
        plan.NothingUsable, match="1 contradictory mpp; .*says 0.5 um per pixel, and by the slide it is 1"
    ):
        make_plan(folder)


def test_an_unknown_resolution_must_be_given_for_a_trained_encoder(tmp_path):
    name = "TCGA-AA-0001-DX1"
    paint(tmp_path / "slides", name, mpp=None)
    unknown = grid_of(name, 4, mpp=None, magnification=10.0, level0_mpp=None)
    path = coords_path(tmp_path, name)
    write_coords(path, unknown)
    import h5py

    with h5py.File(path, "r+") as file:
        for attribute in ("target_magnification", "level0_magnification"):
            file["coords"].attrs[attribute] = "None"
    known = trained(tiny_encoder(mpp=(1.0,)))
    with pytest.raises(DataError, match="resolution of the tiles is not recorded: give --mpp"):
        make_plan(tmp_path, known)
    assert make_plan(tmp_path, known, mpp=1.0).facts["mpp"] == 1.0


def test_tiles_of_several_sizes_or_resolutions_are_refused(tmp_path):
    names = ["TCGA-AA-0001-DX1", "TCGA-AA-0002-DX1"]
    folder = write_cohort(tmp_path, dict.fromkeys(names, 4))
    other = dataclasses.replace(grid_of(names[1], 4), patch_size=64, mpp=0.5, magnification=20.0)
    write_coords(coords_path(folder, names[1]), other)
    with pytest.raises(DataError, match=r"one patch_size, and there are several: 32: 1 slides .*; 64: 1 slides"):
        make_plan(folder)
    write_coords(coords_path(folder, names[1]), grid_of(names[1], 4, mpp=1.05))
    assert make_plan(folder).facts["mpp"] in (1.0, 1.05)


def test_coordinates_of_several_kinds_must_be_chosen_among(folder, tmp_path):
    for kind in ("10x_32px_0px_overlap", "20x_32px_0px_overlap"):
        write_coords(tmp_path / "job" / kind / "patches" / "a_patches.h5", grid_of("a", 3))
    with pytest.raises(
        DataError, match="several: 10x_32px_0px_overlap/patches, 20x_32px_0px_overlap/patches; name one"
    ):
        slides.find_slides(folder / "slides", tmp_path / "job")
    with pytest.raises(DataError, match="no coordinate files .*; write them with histokd tile"):
        slides.find_slides(folder / "slides", tmp_path)


# --- ready-cut images


def write_images(folder, names, edge=32):
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    pixels = [rng.integers(0, 256, (edge, edge, 3), dtype=np.uint8) for _ in names]
    for name, value in zip(names, pixels):
        Image.fromarray(value).save(folder / name)
    return pixels


def test_folders_of_images_become_bags_with_the_coordinates_in_their_names(tmp_path):
    pixels = write_images(tmp_path / "slides" / "TCGA-AA-0001-DX1", ["Tile_(20,5).png", "Tile_(100,64).png"])
    write_images(tmp_path / "slides" / "TCGA-AA-0002-DX1", ["a.png", "b.png", "c.png"])
    (tmp_path / "slides" / "TCGA-AA-0002-DX1" / "note.txt").write_text("no image")
    loaded = tiny_encoder()
    made = make_plan(tmp_path, loaded, images=True, mpp=0.5)
    run.run_embedding(made, tmp_path / "out", cohort.embedder(loaded))
    reader = BagReader(tmp_path / "out")
    assert reader.manifest.mpp == 0.5
    features, coords = reader.read_bag(0)[:2]
    by_name = sorted(zip([[20, 5], [100, 64]], pixels))
    images = transform.prepare(np.stack([value for _, value in by_name]), loaded.encoder.transform)
    expected = np.asarray(build.build(cohort.SPEC).apply(loaded.variables, images))
    order = np.argsort(coords[:, 0])
    np.testing.assert_array_equal(coords[order], [[20, 5], [100, 64]])
    np.testing.assert_allclose(features[order].astype(np.float32), expected, atol=4e-3)
    assert (reader.read_bag(1)[1] == -1).all()


def test_faulty_images_go_to_quarantine(tmp_path):
    place = tmp_path / "slides"
    write_images(place / "s1", ["a.png", "b.png"])
    write_images(place / "s2", ["a.png"])
    write_images(place / "s2", ["b.png"], edge=48)
    write_images(place / "s3", ["Tile_(1,2).png", "other_(1,2).png"])
    write_images(place / "s4", ["a.png"])
    (place / "s4" / "a.png").write_bytes(b"\x89PNG cut")
    loaded = tiny_encoder()
    made = make_plan(tmp_path, loaded, images=True, rule=CaseRule(own=True))
    outcome = run.run_embedding(made, tmp_path / "out", cohort.embedder(loaded))
    assert reasons(outcome.rejected) == {"s2": "unreadable tile", "s3": "bad coordinates", "s4": "unreadable tile"}
    with pytest.raises(DataError, match="neither images"):
        slides.find_images(tmp_path / "out")


# --- computation


def test_a_plan_is_not_run_with_another_encoder_or_stain(folder, tmp_path):
    stain = transform.Stain({"method": "none"}, fit=lambda tiles: 0, apply=lambda tiles, p: tiles)
    for engine in (cohort.embedder(tiny_encoder(1)), Embedder(tiny_encoder(), Compute(8), stain)):
        with pytest.raises(ValueError, match="made for another encoder or stain"):
            run.run_embedding(make_plan(folder), tmp_path / "out", engine)
    assert not (tmp_path / "out").exists()


def test_batches_that_devices_cannot_divide_are_refused():
    with pytest.raises(ValueError, match="7 tiles cannot be divided over 2 devices"):
        cohort.embedder(batch=7)
    with pytest.raises(ValueError, match="needs bfloat16 on a GPU"):
        cohort.embedder(attention="cudnn")


def test_half_precision_gives_nearly_the_same_embeddings(folder):
    loaded = tiny_encoder()
    tiles = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    full, half = (np.asarray(cohort.embedder(loaded, dtype=dtype)(tiles)) for dtype in ("float32", "bfloat16"))
    cosine = (full * half).sum(1) / np.linalg.norm(full, axis=1) / np.linalg.norm(half, axis=1)
    assert 0.995 < cosine.min() and np.abs(full - half).max() > 0
