"""Cluster ids of patches: planted clusters are found, the nearest centre is chosen, training slides only, files."""

import numpy as np
import pytest

from data_pipelines import clusters
from data_pipelines.errors import DataError
from data_pipelines.reader import BagReader
from data_pipelines.writer import DatasetWriter

D, K, SIZES = 5, 4, (60, 3, 150, 90)


def planted(size, seed):
    """Patches around K far centres, and which centre each belongs to."""
    rng = np.random.default_rng(seed)
    own = rng.integers(0, K, size)
    centres = 20.0 * np.eye(K, D)
    return (centres[own] + rng.normal(size=(size, D))).astype(np.float32), own


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("clusters") / "data"
    with DatasetWriter(path, name="planted", feat_dim=D, dtype="float32", simulated=True, simulation={}) as out:
        for i, size in enumerate(SIZES):
            out.add(f"s{i}", f"c{i}", planted(size, i)[0], np.zeros((size, 2), np.int32))
    return path


@pytest.fixture(scope="module")
def reader(dataset):
    return BagReader(dataset)


def same_partition(a, b):
    """Whether two labellings agree up to names."""
    return len(set(zip(a, b))) == len(set(a)) == len(set(b))


def test_planted_clusters_are_found_on_slides_that_were_not_fitted(reader):
    model = clusters.fit_clusters(reader, [2, 3], k=K, sample=200, seed=1)
    assert model.centres.shape == (K, D) and model.source["slides"] == ["s2", "s3"]
    found = clusters.assign_clusters(reader, range(len(SIZES)), model)
    assert {k: len(v) for k, v in found.items()} == {f"s{i}": n for i, n in enumerate(SIZES)}
    for slide in (0, 2):
        # Patches are stored in another order than they were written in.
        truth = np.argmax(reader.read_bag(slide)[0][:, :K], axis=1)
        assert found[f"s{slide}"].dtype == np.int32 and same_partition(found[f"s{slide}"], truth)


def test_assignment_is_the_nearest_centre_and_the_first_of_equals():
    rng = np.random.default_rng(0)
    centres, x = rng.normal(size=(6, D)).astype(np.float32), rng.normal(size=(50, D)).astype(np.float32)
    distance = ((x[:, None].astype(np.float64) - centres[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(clusters.ClusterModel(centres, {}).assign(x), distance.argmin(axis=1))
    twins = clusters.ClusterModel(np.stack([centres[0], centres[0]]), {})
    np.testing.assert_array_equal(twins.assign(x), 0)
    with pytest.raises(DataError, match="width 5"):
        twins.assign(x[:, :3])


def test_only_training_slides_are_read_for_the_fit(reader):
    seen = []

    class Watched:
        manifest = reader.manifest

        @staticmethod
        def read_into(slide, *args):
            seen.append(slide)
            reader.read_into(slide, *args)

    clusters.fit_clusters(Watched, [0, 2], k=2, sample=20)
    assert set(seen) == {0, 2}


def test_the_sample_takes_as_many_of_every_slide_and_is_reproducible(reader):
    first, again = (clusters.sample_patches(reader, [0, 1, 2], 30, seed=3) for _ in range(2))
    assert first.shape == (10 + 3 + 10, D)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, clusters.sample_patches(reader, [0, 1, 2], 30, seed=4))
    with pytest.raises(DataError, match="no slides"):
        clusters.sample_patches(reader, [], 30)


def test_clusters_of_every_slide_on_its_own(reader):
    found = clusters.assign_per_slide(reader, [1, 2], k=K, seed=0)
    assert same_partition(found["s2"], np.argmax(reader.read_bag(2)[0][:, :K], axis=1))
    assert len(set(found["s1"])) == 3, "a slide of three patches has three clusters"


def test_more_clusters_than_patches_is_refused():
    with pytest.raises(DataError, match="3 patches cannot form k = 4"):
        clusters.fit_centres(np.zeros((3, D)), 4)


def test_written_ids_are_read_back(tmp_path):
    ids = {"b": np.array([3, 0, 1]), "a": np.array([2])}
    clusters.write_clusters(tmp_path / "ids.npz", ids, K, {"seed": 1})
    back = clusters.read_clusters(tmp_path / "ids.npz", K)
    assert list(back) == ["a", "b"]
    for name, value in ids.items():
        np.testing.assert_array_equal(back[name], value)
    assert [p.name for p in tmp_path.iterdir()] == ["ids.npz"]
    with pytest.raises(DataError, match="has 4 clusters, the network 10"):
        clusters.read_clusters(tmp_path / "ids.npz", 10)
    with pytest.raises(DataError, match=r"slide 'b'.*\[0, 3\)"):
        clusters.write_clusters(tmp_path / "bad.npz", ids, 3)
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match="text.npz is not a file of cluster ids"):
        clusters.read_clusters(tmp_path / "text.npz")
