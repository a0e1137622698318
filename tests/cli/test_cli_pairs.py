"""`histokd pairs` and `histokd simulate --kind pairs` as users call them."""

import pair_files
import pytest

from data_pipelines.pairs.manifest import PairManifest


def test_an_import_tells_what_it_found_and_ends_with_3_if_files_are_in_quarantine(histokd, tmp_path):
    pair_files.bci(tmp_path / "s", train=4, test=2)
    source, out = tmp_path / "s", tmp_path / "data"
    dry = histokd("pairs", source, "--out", out, "--dry-run")
    assert dry.code == 0 and "layout: bci" in dry.out and "parts: train 4, test 2" in dry.out and not out.exists()
    assert "labels: 0 2, 1+ 2, 2+ 1, 3+ 1" in dry.out
    assert histokd("pairs", source, "--out", out, "--resize", 32).code == 0
    again = histokd("pairs", source, "--out", out, "--resize", 32)
    assert "was complete already" in again.out and PairManifest.load(out).image_size == (32, 32)
    (source / "train/IHC/00001_train_1+.png").unlink()
    refused = histokd("pairs", source, "--out", out)
    assert refused.code == 1 and "--overwrite" in refused.err
    done = histokd("pairs", source, "--out", out, "--overwrite")
    assert done.code == 3 and "quarantine: 1 files: 1 missing partner" in done.out
    assert "5 examples, 5 with a partner image" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resize", "big"), "--resize big: expected pixels, like 256 or 256x512"),
        (("--label-regex", "x", "--label-field", 1), "exclude each other"),
        (("--label-regex", "grade(x)"), "does not match 6 of 6 file names"),
        (("--multiple-of", 0), "expected at least 1"),
        (("--multiple-of", 32), "multiples of 32"),
        (("--mpp", -1), "--mpp -1.0: expected a positive number"),
        (("--labels", "nowhere.csv"), "nowhere.csv"),
        (("--partner-folder", "CD3"), "no partner folder"),
    ],
)
def test_bad_requests_end_in_one_line(histokd, tmp_path, arguments, message):
    pair_files.bci(tmp_path / "s", train=4, test=2)
    done = histokd("pairs", tmp_path / "s", "--out", tmp_path / "data", *arguments)
    assert done.code == 1 and message in done.err and len(done.err.strip().splitlines()) == 1


def test_no_folder_and_nothing_usable(histokd, tmp_path):
    assert "does not exist" in histokd("pairs", tmp_path / "none", "--out", tmp_path / "data").err
    pair_files.bci(tmp_path / "s", train=1, test=1)
    for path in (tmp_path / "s").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    done = histokd("pairs", tmp_path / "s", "--out", tmp_path / "data")
    assert done.code == 1 and "none of 2 files" in done.err
    assert "truncated image" in (tmp_path / "data/quarantine.csv").read_text()


def test_pairs_are_simulated_and_marked(histokd, tmp_path):
    arguments = ("--kind", "pairs", "--set", "n_train=8", "--set", "n_test=4", "--set", "size=16", "--seed", 2)
    done = histokd("simulate", "--out", tmp_path / "sim", *arguments)
    assert done.code == 0 and "12 simulated image pairs of 16x16 pixels" in done.out
    assert PairManifest.load(tmp_path / "sim").simulated
    assert histokd("simulate", "--out", tmp_path / "x", "--kind", "pairs", "--preset", "demo").code == 1
