"""`histokd embed`, and from a real slide to a student's prediction with three commands."""

import csv
import json

import numpy as np
import pytest
import wsi_slides

from data_pipelines.manifest import Manifest
from data_pipelines.reader import BagReader
from data_pipelines.torch_file import write_state_dict
from data_pipelines.wsi.coords import TileGrid, write_coords

TINY = ["--encoder", "vit_tiny", "--spec", "depth=1", "--spec", "width=12", "--spec", "heads=2", "--spec", "hidden=24"]
RANDOM = [*TINY, "--random-weights", "0"]


def files_of(tmp_path, names=("TCGA-AA-0001-DX1", "TCGA-AA-0002-DX1")):
    for seed, name in enumerate(names):
        wsi_slides.with_tissue(tmp_path / "slides" / f"{name}.tiff", seed, height=400, width=500)
        grid = TileGrid(name, np.array([[0, 0], [64, 64], [128, 0]], np.int32), 64, 64, 0.5, 20.0, 0.5)
        write_coords(tmp_path / "job" / "20x_64px_0px_overlap" / "patches" / f"{name}_patches.h5", grid)
    return [tmp_path / "slides", "--coords", tmp_path / "job", "--out", tmp_path / "out", "--batch", 8, "--threads", 2]


def test_slides_are_embedded_and_random_weights_are_announced(histokd, tmp_path):
    arguments = files_of(tmp_path)
    planned = histokd("embed", *arguments, *RANDOM, "--dry-run")
    assert planned.code == 0 and "2 slides, 6 tiles of 64 px" in planned.out and not (tmp_path / "out").exists()
    done = histokd("embed", *arguments, *RANDOM)
    assert done.code == 0 and "2 slides of 2 cases, 6 patches of width 12" in done.out
    assert "WARNING: Embeddings of an UNTRAINED encoder: RANDOM, NOT TRAINED (seed 0)" in done.out
    assert "tiles of 64 px are resized to 224 px (bilinear)" in done.out
    again = histokd("embed", *arguments, *RANDOM)
    assert again.code == 0 and "was complete already" in again.out
    other = histokd("embed", *arguments, *TINY, "--random-weights", "1")
    assert other.code == 1 and "--overwrite" in other.err


def test_slides_in_quarantine_set_the_exit_code(histokd, tmp_path):
    arguments = files_of(tmp_path)
    (tmp_path / "slides" / "TCGA-AA-0002-DX1.tiff").write_bytes(b"")
    done = histokd("embed", *arguments, *RANDOM)
    assert done.code == 3 and "quarantine: 1 slides: 1 unreadable slide" in done.out
    (tmp_path / "slides" / "TCGA-AA-0001-DX1.tiff").write_bytes(b"")
    nothing = histokd("embed", *arguments[:3], "--out", tmp_path / "none", *RANDOM)
    assert nothing.code == 1 and "none of 2 slides can be embedded" in nothing.err
    assert "unreadable slide" in (tmp_path / "none" / "quarantine.csv").read_text()


def test_an_encoder_of_our_own_is_loaded_from_its_folder(histokd, tmp_path):
    from histokd_jax.encoders import folder, loading, presets

    encoder = presets.changed(presets.get("vit_tiny"), [text for text in TINY[2:] if "=" in text])
    encoder = loading.random(encoder, 5)
    folder.save(tmp_path / "mine", encoder.encoder, encoder.variables, method="self-supervised")
    done = histokd("embed", *files_of(tmp_path), "--weights", tmp_path / "mine")
    assert done.code == 0 and "WARNING" not in done.out
    assert Manifest.load(tmp_path / "out").encoder["weights_sha256"] == encoder.sha256
    refused = histokd("embed", *files_of(tmp_path), "--weights", tmp_path / "mine", "--encoder", "uni")
    assert refused.code == 1 and "says itself which encoder it holds" in refused.err


def test_weights_of_another_architecture_are_refused_in_one_line(histokd, tmp_path):
    write_state_dict(tmp_path / "w.pt", {"conv1.weight": np.ones((2, 3, 7, 7), np.float32)})
    done = histokd("embed", *files_of(tmp_path), *TINY, "--weights", tmp_path / "w.pt")
    assert done.code == 1 and "w.pt: not weights of the encoder vit_tiny" in done.err
    assert "missing keys: patch_embed.proj.weight" in done.err and "unknown keys: conv1.weight" in done.err


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ([], "give --weights FILE, or --random-weights SEED"),
        (["--random-weights", "0"], "--encoder NAME is needed: vit_tiny, "),
        (["--random-weights", "0", "--encoder", "uni7"], "encoder 'uni7' is unknown"),
        ([*RANDOM, "--spec", "colour=blue"], "the architecture of vit_tiny has patch, width"),
        ([*RANDOM, "--tiles"], "give --coords DIR for slides, or --tiles"),
        ([*RANDOM, "--stain", "macenko"], "--stain macenko needs --stain-reference IMAGE"),
        ([*RANDOM, "--stain", "absent.json"], "absent.json: neither one of macenko, reinhard, vahadane nor a file"),
        ([*RANDOM, "--stain-reference", "a.png"], "--stain-reference needs --stain METHOD"),
        ([*RANDOM, "--mpp", "-1"], "--mpp -1.0: expected micrometres per pixel"),
        ([*RANDOM, "--batch", "9"], "9 tiles cannot be divided over 8 devices"),
        ([*TINY, "--weights", "absent.pt"], "absent.pt"),
        ([*RANDOM, "--case-regex", "(XYZ)"], "finds no case in the slide id"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(histokd, tmp_path, extra, text):
    done = histokd("embed", *files_of(tmp_path), *extra)
    assert done.code == 1 and text in done.err, done.err


def test_encoders_are_listed_with_their_licences(histokd):
    done = histokd("embed", "--list-encoders")
    assert done.code == 0
    for name in ("uni2_h", "virchow2", "gigapath", "h_optimus_0", "phikon", "resnet50_clam"):
        assert name in done.out
    assert "CC BY-NC-ND 4.0" in done.out


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_stains_are_normalised_towards_the_reference(histokd, tmp_path, method):
    """The encoder sees other pixels; a slide without stains goes to quarantine."""
    from PIL import Image

    arguments = files_of(tmp_path)
    for seed, name in enumerate(["TCGA-AA-0001-DX1", "TCGA-AA-0002-DX1"]):
        rgb = (
            wsi_slides.glass(400, 500)
            if seed
            else wsi_slides.stain(wsi_slides.glass(400, 500), np.ones((400, 500), bool))
        )
        wsi_slides.write(tmp_path / "slides" / f"{name}.tiff", rgb)
    other = wsi_slides.stain(wsi_slides.glass(64, 64), np.ones((64, 64), bool), seed=3)
    Image.fromarray((other * [0.8, 0.9, 0.7]).astype(np.uint8)).save(tmp_path / "reference.png")
    done = histokd("embed", *arguments, *RANDOM, "--stain", method, "--stain-reference", tmp_path / "reference.png")
    assert done.code == 3, done.err
    assert f"stains: {method}, fitted to each slide" in done.out
    with open(tmp_path / "out" / "quarantine.csv", newline="") as file:
        assert [(r["slide_id"], r["reason"]) for r in csv.DictReader(file)] == [("TCGA-AA-0002-DX1", "no stains")]
    assert Manifest.load(tmp_path / "out").encoder["stain"]["method"] == method
    plain = [*arguments[:3], "--out", tmp_path / "plain", *arguments[5:]]
    assert histokd("embed", *plain, *RANDOM).code == 0
    one, other = (BagReader(tmp_path / name).read_bag(0)[0].astype(float) for name in ("out", "plain"))
    assert np.abs(one - other).max() > 0.01


# --- real files


@pytest.mark.real_data
def test_from_a_real_slide_to_a_prediction_and_its_attention_with_three_commands(
    histokd, finished_run, real_data, tmp_path
):
    """The student was trained on simulated bags and the encoder is random: this shows the way, not a result."""
    slide = real_data / "wsi" / "CMU-1-Small-Region.svs"
    tiled = histokd("tile", slide, "--out", tmp_path / "job", "--workers", 1)
    assert tiled.code == 0, tiled.err
    arguments = ["--coords", tmp_path / "job", "--out", tmp_path / "data", "--batch", 16, "--case-per-slide"]
    embedded = histokd("embed", slide, *arguments, *RANDOM)
    assert embedded.code == 0, embedded.err
    attention = tmp_path / "attention"
    told = histokd("predict", "--model", finished_run, "--data", tmp_path / "data", "--out", tmp_path / "p.csv",
                   "--attention", attention)  # fmt: skip
    assert told.code == 0, told.err

    manifest = Manifest.load(tmp_path / "data")
    assert [s.slide_id for s in manifest.slides] == ["CMU-1-Small-Region"] and manifest.mpp == 0.5
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and {row["slide_id"] for row in rows} == {"CMU-1-Small-Region"}
    with open(attention / "CMU-1-Small-Region.csv", newline="") as file:
        patches = list(csv.DictReader(file))
    assert len(patches) == manifest.slides[0].n_patches > 20
    assert sum(float(row["attention"]) for row in patches) == pytest.approx(1, abs=1e-3)
    places = np.array([[int(row["x"]), int(row["y"])] for row in patches])
    assert len(np.unique(places, axis=0)) == len(places)
    assert (places >= 0).all() and (places < [[2220, 2967]]).all()


@pytest.mark.real_data
def test_real_files_are_embedded_or_refused_for_the_right_reason(histokd, real_data, tmp_path):
    """The DICOM is refused by OpenSlide; the slide without mpp is fine once its coordinates say what they are."""
    names = ["small_dicom", "tcga-cr-7395-01a-01-ts1", "test3-DAPI-2-(387)", "CMU-1-Small-Region"]
    for name in names:
        grid = TileGrid(name, np.array([[0, 0], [512, 512], [1024, 256]], np.int32), 256, 256, 0.5, 20.0)
        if name.startswith("test3"):
            grid = TileGrid(name, grid.coords, 128, 256, 0.456, None, 0.228)
        write_coords(tmp_path / "patches" / f"{name}_patches.h5", grid)
    base = [real_data / "wsi", "--coords", tmp_path, "--batch", 8, "--case-per-slide", *RANDOM]
    mixed = histokd("embed", *base, "--out", tmp_path / "mixed")
    assert mixed.code == 1 and "one patch_size, and there are several: 128" in mixed.err
    done = histokd("embed", *base, "--out", tmp_path / "out", "--exclude", "test3*")
    assert done.code == 3
    assert [s.slide_id for s in Manifest.load(tmp_path / "out").slides] == [names[3], names[1]]
    with open(tmp_path / "out" / "quarantine.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["slide_id"], row["reason"]) for row in rows] == [("small_dicom", "unreadable slide")]


@pytest.mark.real_data
def test_real_tile_images_are_embedded(histokd, real_data, tmp_path):
    source = real_data / "feature_bags" / "mopadi"
    done = histokd("embed", source, "--tiles", "--out", tmp_path / "out", "--batch", 8, *RANDOM)
    assert done.code == 0, done.err
    coords = BagReader(tmp_path / "out").read_bag(0)[1]
    assert sorted(map(tuple, coords.tolist())) == [(16896, 20480), (22016, 11776), (23040, 25088)]
    facts = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert facts["mpp"] is None and facts["encoder"]["patch_size"] == 512
