"""Classic MIL benchmarks: both layouts, what is refused, standardisation, and the data set written from them."""

import gzip

import numpy as np
import pytest
import scipy.io

from data_pipelines import mil_classic
from data_pipelines.errors import DataError
from data_pipelines.manifest import Manifest
from data_pipelines.reader import BagReader
from data_pipelines.tables import read_labels

ROWS = "1,7,0.5,2\n0,x,1,-1\n1,7,3.25,4\n"


def write(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_mat(folder, x, bag, label):
    folder.mkdir(exist_ok=True)
    for name, variable, value in (("X", "X", x), ("Bag2", "Bag2", bag), ("BagI", "bagI", label)):
        scipy.io.savemat(folder / f"{name}.mat", {variable: np.asarray(value)})
    return folder


@pytest.mark.parametrize("name", ["toy.csv", "toy.csv.gz"])
def test_csv_rows_are_gathered_by_bag(tmp_path, name):
    bags = mil_classic.read_csv(write(tmp_path / name, ROWS))
    assert bags.name == "toy" and bags.bag_id == ("7", "x") and bags.label.tolist() == [1, 0] and bags.feat_dim == 2
    assert bags.features[0].tolist() == [[0.5, 2], [3.25, 4]] and bags.features[1].tolist() == [[1, -1]]


def test_mat_equals_csv(tmp_path):
    folder = write_mat(tmp_path / "m", [[0.5, 2], [1, -1], [3.25, 4]], [[1], [2], [1]], [[1], [0]])
    bags, same = mil_classic.read_mat(folder, "toy"), mil_classic.read_csv(write(tmp_path / "t.csv", ROWS))
    assert bags.name == "toy" and bags.bag_id == ("1", "2")
    np.testing.assert_array_equal(bags.label, same.label)
    for a, b in zip(bags.features, same.features):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,1,0.5\n0,1,0.5\n", r"bag '1' has the labels \[.*0.*1"),
        ("2,1,0.5\n", "one, 0 or 1"),
        ("1,1,0.5,1\n1,1,abc,1\n", "line 2, column 2: 'abc'"),
        ("1,1,0.5\n1,1,\n", "line 2, column 2: ''"),
        ("1,1,inf\n", "column 2: 'inf'"),
        ("yes,1,2\n", "column 0: 'yes'"),
        ("1,1\n", "2 columns"),
        ("", "no table of bags"),
        ("1,1,2\n1,1,2,3,4\n", "no table of bags"),
    ],
)
def test_bad_csv_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        mil_classic.read_csv(write(tmp_path / "bad.csv", text))
    assert "bad.csv" in str(caught.value)


def test_damaged_or_missing_files(tmp_path):
    path = write(tmp_path / "a.csv.gz", ROWS * 500)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="a.csv.gz"):
        mil_classic.read_csv(path)
    for read in (mil_classic.read_csv, lambda p: mil_classic.read_mat(p, "n")):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "absent")


def test_bad_mat_is_named(tmp_path):
    x = np.ones((3, 2))
    for bag, label, message in (
        ([1, 2], [1, 0], "Bag2 has 2 entries"),
        ([1, 2, 3], [1, 0], "holds bag 3"),
        ([0, 1, 2], [1, 0], "lowest 0"),
        ([1, 2, 2], [1, 5], "labels"),
    ):
        with pytest.raises(DataError, match=message):
            mil_classic.read_mat(write_mat(tmp_path / "m", x, bag, label), "n")
    with pytest.raises(DataError, match="X.mat, line 2, column 0"):
        mil_classic.read_mat(write_mat(tmp_path / "m", [[1.0], [np.nan]], [1, 1], [1]), "n")
    scipy.io.savemat(tmp_path / "m" / "X.mat", {"Y": x})
    with pytest.raises(DataError, match=r"'X' is missing; it holds \['Y'\]"):
        mil_classic.read_mat(tmp_path / "m", "n")
    (tmp_path / "m" / "X.mat").write_bytes(b"no matlab file" * 20)
    with pytest.raises(DataError, match="X.mat"):
        mil_classic.read_mat(tmp_path / "m", "n")


def test_standardisation_looks_at_training_bags_only():
    rng = np.random.default_rng(0)
    features = tuple(rng.normal(3, 5, (n, 4)) for n in (4, 2, 6))
    for x in features:
        x[:, 3] = 2.0
    bags = mil_classic.MilBags("t", features, np.array([1, 0, 1], np.int32), ("a", "b", "c"))
    mean, scale = mil_classic.moments(bags, [0, 2])
    seen = np.concatenate([features[0], features[2]])
    np.testing.assert_allclose(mean, seen.sum(0) / 10)
    np.testing.assert_allclose(scale[:3], np.sqrt(((seen - mean) ** 2).sum(0) / 10)[:3])
    assert scale[3] == 1
    other = mil_classic.MilBags("t", (features[0], features[1] + 100, features[2]), bags.label, bags.bag_id)
    for a, b in zip(mil_classic.moments(other, [0, 2]), (mean, scale)):
        np.testing.assert_array_equal(a, b)


def test_written_data_set_reads_back(tmp_path):
    bags = mil_classic.read_csv(write(tmp_path / "toy.csv", ROWS))
    mil_classic.write_dataset(tmp_path / "set", bags)
    manifest = Manifest.load(tmp_path / "set")
    assert [slide.slide_id for slide in manifest.slides] == ["toy-7", "toy-x"] and not manifest.simulated
    labels = read_labels(tmp_path / "set" / "tables" / "labels.csv", mil_classic.TASK)
    assert labels.case_id == ("toy-7", "toy-x") and labels.value.tolist() == [1, 0]
    reader = BagReader(manifest)
    for row, x in enumerate(bags.features):
        stored, _ = reader.read_bag(row)
        np.testing.assert_array_equal(np.sort(stored, axis=0), np.sort(x, axis=0))


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "n", "instances", "positive", "width"),
    [("musk1", 92, 476, 47, 166), ("elephant", 200, 1391, 100, 230), ("fox", 200, 1320, 100, 230)],
)
def test_published_benchmarks_have_their_counts(real_data, name, n, instances, positive, width):
    folder = real_data / "mil_classic"
    read = mil_classic.read_mat(folder / "fox_original", "fox") if name == "fox" else None
    bags = read or mil_classic.read_csv(folder / f"{name}.csv.gz")
    assert (len(bags.label), sum(map(len, bags.features)), int(bags.label.sum())) == (n, instances, positive)
    assert bags.feat_dim == width
