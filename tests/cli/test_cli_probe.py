"""`histokd probe` from the command line."""

import json

import numpy as np
import pytest
from labelled_setup import RESNET, blobs, resnet, write_folder

from histokd_jax.encoders import folder

QUICK = ("--seeds", "0", "--bootstrap", "50", "--k", "3", "--batch", "8", "--threads", "1")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("encoder") / "ours"
    folder.save(directory, RESNET, resnet().variables)
    return directory


def test_a_folder_of_images_from_start_to_report(histokd, encoder, tmp_path):
    data, out = write_folder(tmp_path / "patches"), tmp_path / "out"
    shown = histokd(
        "probe", data, "--encoder", encoder, "--encoder", "floor=resnet50,blocks=1,width=4,image=32@random:1",
        "--folds", 2, "--fractions", "1,0.5", "--maps", out / "maps", "--map-count", 2, "--out", out, *QUICK,
    )  # fmt: skip
    assert shown.code == 0, shown.err
    assert "benign 6, malignant 6" in shown.out and "linear@0.5" in shown.out and "report:" in shown.out
    assert "floor: random weights, not trained" in shown.out
    table = json.loads((out / "table.json").read_text())
    assert table["split"]["kind"] == "groups" and table["unit"] == "groups"
    assert (out / "report.html").exists() and len(list((out / "maps" / "ours").glob("*.png"))) == 2
    again = histokd("probe", data, "--encoder", encoder, "--folds", 2, "--out", out, *QUICK)
    assert again.code == 1 and "--overwrite" in again.err


def test_feature_families_of_one_file(histokd, tmp_path):
    x, label = blobs(60)
    weak, x[4, 3] = x[::-1].copy(), np.nan
    np.savez(tmp_path / "f.npz", strong=x, weak=weak, label=label, source_row=np.arange(60))
    common = ("probe", tmp_path / "f.npz", "--out", tmp_path / "out", "--no-report", *QUICK)
    refused = histokd(*common)
    assert refused.code == 1 and "--missing mean" in refused.err and not (tmp_path / "out").exists()
    shown = histokd(*common, "--missing", "mean", "--probes", "linear,mlp256,knn", "--epochs", 2, "--knn-standardise")
    assert shown.code == 0, shown.err
    assert "contiguous blocks" in shown.out and "weak" in shown.out and "mlp256@1" in shown.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--fractions", "0.1,x"), "expected numbers separated by commas"),
        (("--probes", "svm"), "--probes svm"),
        (("--folds", "1"), "--folds 1"),
        (("--encoder", "no/such/encoder"), "no encoder folder"),
        (("--input", "partner"), "needs a pair data set"),
        (("--classes", "benign,other"), "are none of the classes"),
    ],
)
def test_bad_input_is_one_line(histokd, tmp_path, arguments, named):
    data = write_folder(tmp_path / "patches", per_class=2)
    shown = histokd("probe", data, "--out", tmp_path / "out", *arguments)
    assert shown.code == 1 and named in shown.err and len(shown.err.strip().splitlines()) == 1


def test_clusters_without_umap_are_refused_before_any_work(histokd, encoder, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "umap", None)
    data = write_folder(tmp_path / "patches")
    shown = histokd("probe", data, "--encoder", encoder, "--folds", 2, "--clusters", "--out", tmp_path / "out", *QUICK)
    assert shown.code == 1 and "histokd_jax[clusters]" in shown.err and not (tmp_path / "out").exists()


@pytest.mark.real_data
def test_real_labelled_patches_with_a_random_encoder(histokd, real_data, encoder, tmp_path):
    """Ten BreaKHis images of eight patients, 700 x 460 px: the smallest real set."""
    data = real_data / "labelled_patches" / "breakhis_400x"
    shown = histokd("probe", data, "--encoder", encoder, "--folds", 2, "--out", tmp_path / "out", *QUICK)
    assert shown.code == 0, shown.err
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert table["data"] == {
        "name": "breakhis_400x",
        "patches": 10,
        "classes": {"benign": 5, "malignant": 5},
        "groups": 8,
    }
    assert {row["mode"] for row in table["rows"]} == {"linear@1", "knn3@1"}
    assert table["unit"] == "groups" and table["split"]["kind"] == "groups"
