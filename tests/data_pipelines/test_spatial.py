"""The her2st builder on a small made-up pair of sections, and on a few spots of the real ones."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_pipelines import her2st, spatial
from data_pipelines.cohort import build_cohort
from data_pipelines.errors import DataError
from data_pipelines.reader import BagReader
from data_pipelines.spatial import build_her2st
from data_pipelines.splits import read_folds

PITCH = 40.0
SMALL = {"patch_px": 16, "grid": 2, "stride_px": 16}


def _write_section(folder, name, shared, own, seed):
    """A 3 x 4 array of spots on a 240 x 260 image, with one spot each lacking counts, annotation, or image room."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    image = rng.integers(0, 256, (260, 240, 3)).astype(np.uint8)
    Image.fromarray(image).save(folder / her2st.IMAGES[name], quality=95)
    spots = [(x, y) for x in range(1, 4) for y in range(1, 5)]
    pixels = {(x, y): (PITCH * x + 20.0, PITCH * y + 30.25) for x, y in spots} | {(6, 4): (260.0, 190.25)}
    selection = pd.DataFrame(
        [(x, y, px, py) for (x, y), (px, py) in pixels.items()], columns=["x", "y", "pixel_x", "pixel_y"]
    )
    selection.to_csv(folder / f"{name}_selection.tsv", sep="\t", index=False)
    genes = [*shared, own]
    counts = pd.DataFrame(rng.poisson(3.0, (len(spots) + 1, len(genes))), columns=genes)
    counts.index = [f"{x}x{y}" for x, y in [*spots[1:], (6, 4), (8, 8)]]
    counts[shared[-1]] = 0
    counts.loc["2x2", shared[-1]] = 1
    with gzip.open(folder / f"{name}.tsv.gz", "wt") as file:
        counts.to_csv(file, sep="\t")
    annotated = [(x, y) for x, y in [*spots, (6, 4)] if (x, y) != (3, 4)]
    annotation = pd.DataFrame([(i % 2, x, y) for i, (x, y) in enumerate(annotated)], columns=["label", "x", "y"])
    annotation.to_csv(folder / f"{name}-cluster-annotation.tsv.gz", sep="\t")
    return counts


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("her2st")
    shared = ["GENE_B", "GENE_A", "GENE_C", "RARE"]
    counts = {n: _write_section(root / n, n, shared, f"ONLY_{n}", i) for i, n in enumerate(her2st.IMAGES)}
    return root, counts


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("out") / "data"
    return build_her2st(source[0], directory, min_spot_fraction=0.3, **SMALL)


def test_spots_join_and_every_dropped_spot_has_its_reason(built):
    report = json.loads((built.directory / "build_report.json").read_text())
    for section in ("C2", "C3"):
        part = report["sections"][section]
        assert part["n_spots"] == 10
        assert {d["spot"]: d["reason"] for d in part["dropped"]} == {
            "1x1": "no expression counts",
            "3x4": "no cluster annotation",
            "8x8": "no image position",
            "6x4": "image window leaves the section image",
        }
    assert len(built.slides) == 20 and set(built.sizes) == {4}
    assert {s.case_id for s in built.slides} == {"her2st-patient-C"}
    assert built.slides[0].slide_id == "her2st-C2-1x2"
    assert not built.simulated


def test_scope_is_written_into_name_notes_and_report(built):
    report = json.loads((built.directory / "build_report.json").read_text())
    assert "within one patient, across sections" in built.notes
    assert "within_one_patient" in built.name
    assert report["scope"] == "within one patient, across sections"
    assert "fixed constants only" in built.notes


def test_labels_genes_and_folds_join_with_the_bags(built):
    tables = built.directory / "tables"
    cohort = build_cohort(
        built, labels_path=tables / "labels.csv", task="cluster", genes_path=tables / "genes.npz", unit="slide"
    )
    assert len(cohort) == 20 and not cohort.dropped
    folds = read_folds(tables / "splits" / "section_folds", cohort, allow_patient_overlap=True)
    assert len(folds) == 2
    for fold, (train, test) in zip(folds, (("C2", "C3"), ("C3", "C2"))):
        sections = lambda rows: {cohort.slide_id[r].split("-")[1] for r in rows}  # noqa: E731
        assert sections(fold.train) == sections(fold.val) == {train}
        assert sections(fold.test) == {test}
        assert (len(fold.train), len(fold.val), len(fold.test)) == (8, 2, 10)
        assert not fold.unassigned and not fold.not_in_cohort


def test_check_L_section_folds_are_refused_without_allowing_patient_overlap(built):
    tables = built.directory / "tables"
    cohort = build_cohort(built, labels_path=tables / "labels.csv", task="cluster", unit="slide")
    with pytest.raises(DataError, match="patient"):
        read_folds(tables / "splits" / "section_folds", cohort)


def test_expression_is_log_normalised_over_all_genes_of_the_spot(built, source):
    table = np.load(built.directory / "tables" / "genes.npz")
    assert list(table["gene"]) == ["GENE_A", "GENE_B", "GENE_C"]
    row = list(table["case_id"]).index("her2st-C3-2x3")
    counts = source[1]["C3"].loc["2x3"]
    expected = np.log1p(counts[["GENE_A", "GENE_B", "GENE_C"]] / counts.sum() * 1e4)
    np.testing.assert_allclose(table["values"][row], expected, rtol=1e-6)


def test_bag_is_the_descriptor_of_the_pixels_at_its_coords(built, source):
    row = [s.slide_id for s in built.slides].index("her2st-C3-2x3")
    features, coords = BagReader(built).read_bag(row)
    image = np.asarray(Image.open(source[0] / "C3" / her2st.IMAGES["C3"]).convert("RGB"))
    patches = np.stack([image[y : y + 16, x : x + 16] for x, y in coords])
    expected = spatial.DESCRIPTORS["stain_lbp_glcm"](patches)
    np.testing.assert_allclose(np.asarray(features, np.float32), expected, rtol=2e-3, atol=2e-3)
    # The grid is centred on the spot at (100, 150.25).
    np.testing.assert_allclose(coords.mean(axis=0) + 8, (100, 150.25), atol=0.51)


def test_patch_origins_form_a_centred_grid():
    origins = spatial.patch_origins(np.array([100.4, 50.0]), 16, 3, 10)
    assert origins.tolist() == [[x, y] for y in (32, 42, 52) for x in (82, 92, 102)]


def test_per_section_standardisation_is_exact_and_declared_transductive(source, tmp_path):
    manifest = build_her2st(source[0], tmp_path / "d", standardise="per_section", min_spot_fraction=0.3, **SMALL)
    assert "transductive" in manifest.notes
    reader = BagReader(manifest)
    for section in ("C2", "C3"):
        rows = [i for i, s in enumerate(manifest.slides) if f"-{section}-" in s.slide_id]
        patches = np.concatenate([np.asarray(reader.read_bag(i)[0], np.float64) for i in rows])
        np.testing.assert_allclose(patches.mean(axis=0), 0.0, atol=2e-3)
        std = patches.std(axis=0)
        assert (np.isclose(std, 1.0, atol=5e-3) | (std == 0.0)).all()


def test_equal_builds_give_equal_bytes(source, built, tmp_path):
    again = build_her2st(source[0], tmp_path / "again", min_spot_fraction=0.3, **SMALL)
    files = [p.relative_to(built.directory) for p in built.directory.rglob("*") if p.is_file()]
    assert len(files) >= 9
    for file in files:
        assert (built.directory / file).read_bytes() == (again.directory / file).read_bytes(), file


def test_pitch_is_the_slope_of_pixels_on_array_positions(built):
    assert built.mpp == pytest.approx(200.0 / PITCH)
    x, y = np.meshgrid(np.arange(5), np.arange(6))
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"x": x.ravel(), "y": y.ravel()})
    for axis in "xy":
        table[f"pixel_{axis}"] = 290.0 * table[axis] + rng.normal(0, 20, len(table))
    assert her2st.spot_pitch(table) == pytest.approx(290.0, abs=10)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"descriptor": "resnet"}, "resnet"),
        ({"standardise": "global"}, "global"),
        ({"patch_px": 8}, "patch_px"),
        ({"val_fraction": 1.0}, "val_fraction"),
    ],
)
def test_bad_options_are_refused(source, tmp_path, option, message):
    with pytest.raises(DataError, match=message):
        build_her2st(source[0], tmp_path / "d", **{**SMALL, **option})


def test_missing_file_is_named(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="C2.tsv.gz"):
        build_her2st(tmp_path / "nowhere", tmp_path / "d")


def test_repeated_spot_is_named(source, tmp_path):
    path = tmp_path / "C2_selection.tsv"
    path.write_text("x\ty\tpixel_x\tpixel_y\n1\t2\t0\t0\n1\t2\t5\t5\n")
    with pytest.raises(DataError, match="'1x2' occurs twice"):
        her2st._by_spot(path, ("pixel_x", "pixel_y"))


@pytest.mark.real_data
def test_real_sections_give_tissue_bags_with_known_spot_counts(real_data, tmp_path):
    manifest = build_her2st(real_data / "spatial" / "her2st", tmp_path / "her2st", max_spots=8)
    report = json.loads((manifest.directory / "build_report.json").read_text())
    dropped = {name: [d["spot"] for d in part["dropped"]] for name, part in report["sections"].items()}
    assert dropped == {"C2": ["18x20", "23x27"], "C3": ["11x17", "13x9", "17x14"]}
    assert all(part["pitch_px"] == pytest.approx(291, abs=1) for part in report["sections"].values())
    assert manifest.mpp == pytest.approx(0.687, abs=0.002)
    reader = BagReader(manifest)
    bags = np.stack([np.asarray(reader.read_bag(i)[0], np.float32) for i in range(16)])
    assert bags.shape == (16, 25, 122) and np.abs(bags).max() < 40
    glass = bags[..., report["descriptor_names"].index("stain.glass_fraction")] * 0.3
    assert glass.mean() < 0.5  # spots were selected on tissue
