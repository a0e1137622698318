"""DeepAttnMISL through the shared trainer: clusters in the batches, in the model folder, and of new slides."""

import numpy as np
import pytest
import survival_tiny
from survival_tiny import survival_config, survival_config_file, survival_dir

from data_pipelines import clusters, schema
from data_pipelines.errors import DataError
from data_pipelines.manifest import Manifest
from data_pipelines.pipeline import make_eval_dataset
from data_pipelines.reader import BagReader
from histokd_jax import inference
from histokd_jax.evals.survival_predictions import read_survival_predictions
from histokd_jax.train import cluster_choice, experiment, model_dir, run
from histokd_jax.utils import config

__all__ = ["survival_config", "survival_config_file", "survival_dir"]

K = 3
SETTINGS = {"model__name": "deepattnmisl", "model__deepattnmisl__clusters": K, "model__deepattnmisl__width": 8}
SETTINGS |= {"model__deepattnmisl__attn": 4, "model__deepattnmisl__rho": 8}


@pytest.fixture(scope="module")
def trained(survival_dir, survival_config_file, tmp_path_factory):
    """A finished run of one fold; read only."""
    path = tmp_path_factory.mktemp("clustered") / "run"
    run.train(config.load(str(survival_config_file), survival_tiny.overrides(survival_dir, **SETTINGS)), path)
    return path


def fold_of(cfg, number=0):
    opened = experiment.load_experiment(experiment.resolve_width(cfg))
    return opened, experiment.fold_data(opened, number, run.make_method(opened, number))


def nearest(centres, patches):
    distance = ((patches[:, None].astype(np.float64) - centres[None].astype(np.float64)) ** 2).sum(axis=2)
    return distance.argmin(axis=1)


def test_batches_hold_the_nearest_centre_of_every_patch(survival_config):
    _, data = fold_of(survival_config(**SETTINGS))
    assert len(data.clusters.model.source["slides"]) == len(data.split.train), "fitted on training patients only"
    used = set()
    for batch in make_eval_dataset(data.evaluation["test"], num_threads=0):
        real = batch[schema.SEGMENT_IDS] > 0
        expected = nearest(data.clusters.model.centres, batch[schema.PATCHES][real])
        np.testing.assert_array_equal(batch[schema.CLUSTERS][real], expected)
        assert not batch[schema.CLUSTERS][~real].any() and batch[schema.CLUSTERS].dtype == np.int32
        used |= set(expected.tolist())
    assert used == set(range(K))


def test_a_trained_model_assigns_clusters_to_new_slides_as_in_training(trained, survival_dir):
    fold = trained / "fold_0"
    ids, centres = (
        clusters.read_clusters(fold / "clusters.npz", K),
        model_dir.load(fold / "model", "pathology").clusters,
    )
    assert len(ids) == 48 and centres.centres.shape == (K, 12)
    found = inference.predict([fold / "model"], survival_dir, "pathology")
    risk = dict(zip(found.case_id, found.risk))
    table = read_survival_predictions(trained / "predictions_test.csv")
    np.testing.assert_allclose([risk[case] for case in table.case_id], table.risk, rtol=1e-4, atol=1e-5)
    assert np.std(table.risk) > 0
    (fold / "model" / "cluster_centres.npz").rename(fold / "centres_elsewhere.npz")
    try:
        with pytest.raises(DataError, match="cluster_centres.npz"):
            model_dir.load(fold / "model", "pathology")
    finally:
        (fold / "centres_elsewhere.npz").rename(fold / "model" / "cluster_centres.npz")


def test_clusters_of_a_file_are_used_by_slide_and_checked(survival_dir, survival_config, tmp_path):
    manifest, reader = Manifest.load(survival_dir), BagReader(survival_dir)
    model = clusters.fit_clusters(reader, range(10), k=K)
    ids = clusters.assign_clusters(reader, range(len(manifest.slides)), model)
    clusters.write_clusters(tmp_path / "c.npz", ids, K)
    opened, data = fold_of(survival_config(**SETTINGS, data__clusters=tmp_path / "c.npz"))
    assert data.clusters.model is None
    for row, found in data.clusters.ids.items():
        slides = opened.reader.manifest.slides[row].slide_id.split(";")
        np.testing.assert_array_equal(found, np.concatenate([ids[slide] for slide in slides]))
    name = sorted(ids)[0]
    for wrong, message in (
        ({k: v for k, v in ids.items() if k != name}, "no clusters of slide"),
        ({**ids, name: ids[name][:-1]}, "made from another one"),
    ):
        clusters.write_clusters(tmp_path / "w.npz", wrong, K)
        with pytest.raises(DataError, match=message):
            cluster_choice.ids_of_file(tmp_path / "w.npz", K, opened.reader, data.clusters.ids)


def test_resident_cohorts_refuse_clusters(survival_config, tmp_path):
    with pytest.raises(ValueError, match="no cluster ids.*data.resident=off"):
        run.train(survival_config(**SETTINGS, data__resident="on"), tmp_path / "run")
