"""A whole evaluation on tiny images: frozen encoders stay frozen, files hold what they say."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from labelled_setup import RESNET, blobs, patches_of, pictures, resnet

from data_pipelines.errors import DataError
from data_pipelines.labelled.opening import open_patches
from data_pipelines.labelled.parts import Protocol
from histokd_jax.embed.embedder import Compute
from histokd_jax.encoders import folder, loading
from histokd_jax.encoders.variables import fingerprint
from histokd_jax.evals.classification import classification_metrics
from histokd_jax.evals.predictions import read_predictions
from histokd_jax.nn.encoders import build
from histokd_jax.probe import features, training
from histokd_jax.probe.finetune import FinetuneRecipe, finetune
from histokd_jax.probe.maps_files import MapOptions
from histokd_jax.probe.mlp import MlpRecipe
from histokd_jax.probe.run import Computing, run_probes
from histokd_jax.probe.settings import Settings, title_of
from histokd_jax.probe.sources import Source, open_sources
from histokd_jax.report.probe import build_probe_report

COMPUTING = Computing(Compute(batch=8), threads=1)
TINY = Settings(
    probes=("linear", "knn", "mlp256"), fractions=(1.0, 0.5), seeds=(0, 1), ks=(1, 3), bootstrap=50,
    head=MlpRecipe(hidden=4, epochs=2, batch=8),
)  # fmt: skip


@pytest.fixture(scope="module")
def images():
    values, label = pictures(8)
    return patches_of(values, label)


@pytest.fixture(scope="module")
def outcome(images, tmp_path_factory):
    """Two encoders, the second an array; two folds."""
    out = tmp_path_factory.mktemp("probes")
    noise = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    sources = [Source("ours", resnet(), None, "x"), Source("noise", None, noise, "y")]
    options = {"protocol": Protocol(folds=2), "settings": TINY, "computing": COMPUTING}
    maps = MapOptions(out / "maps", count=3)
    return out, run_probes(images, sources, out, **options, maps=maps, command=["histokd", "probe"])


def test_embeddings_are_those_of_the_encoder_in_inference_mode(images, outcome):
    out, _ = outcome
    stored = np.load(out / "embeddings" / "ours.npz")
    tiles = np.stack([images.read(row) for row in range(16)]).astype(np.float32)
    mean, std = (np.array(v, np.float32) for v in (RESNET.transform.mean, RESNET.transform.std))
    expected = build.build(RESNET.spec).apply(
        resnet().variables, (tiles / 255 - mean[None, None, None]) / std[None, None, None]
    )
    np.testing.assert_allclose(stored["features"], expected, rtol=1e-4, atol=1e-4)
    assert stored["ids"].tolist() == list(images.ids) and str(stored["encoder_sha256"]) == resnet().sha256
    assert str(stored["data_fingerprint"]) == images.fingerprint()


def test_exported_embeddings_can_be_probed_alone(images, outcome):
    again = open_patches(outcome[0] / "embeddings" / "ours.npz")
    assert again.ids == images.ids and again.class_names == images.class_names
    np.testing.assert_array_equal(again.label, images.label)
    assert list(again.arrays) == ["features"]


def test_tables_agree_with_the_predictions_beside_them(outcome):
    out, found = outcome
    tables = [read_predictions(out / "predictions" / "ours" / f"seed_{s}.csv") for s in (0, 1)]
    for mode, seeds in (("mlp256@0.5", 2), ("linear@1", 1), ("knn3@0.5", 2)):
        values = [
            classification_metrics(t.of_mode(mode).where(t.of_mode(mode).fold == k).label,
                                   t.of_mode(mode).where(t.of_mode(mode).fold == k).probs)["accuracy"]
            for t in tables if mode in t.modes for k in (0, 1)
        ]  # fmt: skip
        (row,) = [
            r for r in found.table["rows"] if (r["mode"], r["setting"], r["metric"]) == (mode, "ours", "accuracy")
        ]
        assert row["mean"] == pytest.approx(np.mean(values)) and row["seeds"] == seeds and row["pairs"] == len(values)
        assert (row["seed_std"] is None) == (seeds == 1)
    with (out / "table.csv").open() as stream:
        assert {row["setting"] for row in csv.DictReader(stream)} == {"ours", "noise"}
    assert "# Probes on toy" in (out / "table.md").read_text()


def test_a_plain_signal_is_found_and_compared_in_pairs(outcome):
    rows = {(r["mode"], r["setting"]): r for r in outcome[1].table["rows"] if r["metric"] == "accuracy"}
    assert rows["linear@1", "ours"]["mean"] == 1.0, "lightness decides the class"
    difference = rows["linear@1", "noise"]
    assert difference["difference"] == pytest.approx(difference["mean"] - 1.0)
    assert rows["linear@1", "ours"]["difference"] is None


def test_marks_and_manifest_say_what_a_reader_must_know(outcome, images):
    out, found = outcome
    manifest = json.loads((out / "probe_manifest.json").read_text())
    assert manifest["data_fingerprint"] == images.fingerprint()
    assert manifest["encoders"]["ours"]["sha256"] == resnet().sha256
    assert manifest["settings"]["seeds"] == [0, 1] and manifest["versions"]["jax"]
    assert any("leakage cannot be excluded" in mark for mark in found.table["marks"])
    assert "ours: random weights, not trained" in found.table["marks"]


def test_maps_are_of_tested_images_and_stored_as_floats(outcome, images):
    folder_of_maps = outcome[0] / "maps" / "ours"
    assert len(list(folder_of_maps.glob("*.png"))) == 3
    stored = np.load(folder_of_maps / "maps.npz")
    assert stored["maps"].shape == (3, 4, 4) and stored["maps"].dtype == np.float32 and (stored["maps"] >= 0).all()
    for name, fold, logits, shown in zip(stored["ids"], stored["fold"], stored["logits"], stored["shown_class"]):
        row = images.ids.index(str(name))
        assert row in outcome[1].parts.folds[fold].test and logits.argmax() == shown
        table = outcome[1].probed["ours"].runs[0, int(fold)].of_mode("linear@1")
        probs = table.probs[table.slide_id.tolist().index(str(name))]
        np.testing.assert_allclose(np.exp(logits - np.logaddexp(*logits)), probs, atol=2e-3)


def test_report_is_one_page_without_scripts(outcome):
    page = build_probe_report(outcome[0]).read_text()
    assert "<script" not in page and "Linear probe, 50 % of the labels".replace(" %", "&nbsp;%") in page
    assert "Leakage cannot be excluded" in page or "leakage cannot be excluded" in page
    assert "With few labels" in page and "Compared with ours" in page


def test_F3_9_probe_training_leaves_the_encoder_alone(images, tmp_path):
    loaded = resnet()
    before = fingerprint(loaded.variables)
    settings = dataclasses.replace(
        TINY, probes=("linear", "mlp256", "finetune"), tune=FinetuneRecipe(epochs=1, batch=8)
    )
    settings = dataclasses.replace(settings, fractions=(1.0,), seeds=(0,))
    found = run_probes(
        images,
        [Source("a", loaded, None, "a")],
        tmp_path,
        protocol=Protocol(folds=2),
        settings=settings,
        computing=COMPUTING,
    )
    assert fingerprint(loaded.variables) == before
    assert "finetune@1" in found.table["titles"]


def test_F3_8_probing_h_and_e_opens_no_privileged_image(monkeypatch, tmp_path):
    """Partners of a pair data set are not even decoded."""
    from pair_files import bci, imported

    from data_pipelines.pairs import pixels

    source = bci(tmp_path / "bci", train=8, test=8, size=(32, 32))
    imported(tmp_path / "bci", tmp_path / "set")
    patches = open_patches(tmp_path / "set")
    decoded = []
    decode = pixels.decode
    monkeypatch.setattr(pixels, "decode", lambda data: decoded.append(decode(data)) or decoded[-1])
    features.embed_patches(resnet(), patches, Compute(batch=8), threads=1)
    allowed = {he.tobytes() for he, _ in source.values()}
    assert len(decoded) == 16 and all(image.tobytes() in allowed for image in decoded)


def test_another_evaluation_is_not_overwritten_unasked(images, outcome, tmp_path):
    out, _ = outcome
    options = {"protocol": Protocol(folds=4), "settings": TINY, "computing": COMPUTING}
    with pytest.raises(DataError, match="holds another evaluation .*encoders, protocol.*--overwrite"):
        run_probes(images, [Source("ours", resnet(1), None, "x")], out, **options)


def test_stored_embeddings_are_used_only_for_the_same_encoder_and_data(images, tmp_path, monkeypatch):
    calls = []
    embed = features.embed_patches
    from histokd_jax.probe import run as module

    monkeypatch.setattr(module, "embed_patches", lambda *a, **k: calls.append(1) or embed(*a, **k))
    settings = dataclasses.replace(TINY, probes=("linear",), fractions=(1.0,))
    options = {"protocol": Protocol(folds=2), "settings": settings, "computing": COMPUTING, "overwrite": True}
    for loaded, expected in ((resnet(), 1), (resnet(), 1), (resnet(1), 2)):
        run_probes(images, [Source("e", loaded, None, "e")], tmp_path, **options)
        assert len(calls) == expected


def test_a_diverged_probe_is_left_out_and_named(images, tmp_path, monkeypatch):
    def diverged(views, clean, label, rows, num_classes, seeds, recipe):
        return np.full((len(seeds), len(label), num_classes), np.nan)

    monkeypatch.setattr(training, "train_mlp", diverged)
    settings = dataclasses.replace(TINY, fractions=(1.0,), seeds=(0,))
    options = {"protocol": Protocol(folds=2), "settings": settings, "computing": COMPUTING}
    found = run_probes(images, [Source("e", resnet(), None, "e")], tmp_path, **options)
    assert sorted(found.table["failed"]) == [f"e, mlp256@1, seed 0, fold {k}" for k in (0, 1)]
    assert "mlp256@1" not in found.table["titles"] and "linear@1" in found.table["titles"]


def test_augmented_views_differ_and_depend_on_the_patch_only(images):
    pipeline = Settings(probes=("mlp256",), augment="faithful").pipeline
    found = features.embed_views(resnet(), images, Compute(batch=8), pipeline, 2, 0, threads=1)
    again = features.embed_views(resnet(), images, Compute(batch=16), pipeline, 1, 0, threads=1)
    assert found.shape == (2, 16, RESNET.features) and np.abs(found[0] - found[1]).max() > 1e-3
    np.testing.assert_allclose(found[:1], again, rtol=1e-4, atol=1e-4)
    assert Settings(probes=("mlp256",), augment="faithful").n_views == 100, "one view per epoch"


def test_images_of_several_sizes_and_shapes_are_embedded_by_size():
    values, label = pictures(2)
    wide = np.concatenate([values[1], values[1][:, :8]], axis=1)
    odd = [values[0], wide, np.repeat(np.repeat(values[2], 2, 0), 2, 1), values[3]]
    patches = patches_of(None, label, read=odd.__getitem__)
    found = features.embed_patches(resnet(), patches, Compute(batch=8), threads=1)
    centred = patches_of(None, label, read=[values[0], wide[:, 4:36], odd[2], values[3]].__getitem__)
    np.testing.assert_allclose(found, features.embed_patches(resnet(), centred, Compute(batch=8), threads=1), atol=1e-5)


def test_standardisation_uses_training_rows_only_and_fills_absent_values():
    x, _ = blobs(20, width=3)
    x[:, 2] = 7.0
    x[3, 0] = np.nan
    train = np.arange(10)
    scale = features.scale_of(x, train)
    found = scale.standardised(x)
    own = np.delete(x[:10, 0].astype(np.float64), 3)
    assert found[3, 0] == 0 and (found[:, 2] == 0).all()
    np.testing.assert_allclose(found[15, 0], (x[15, 0] - own.mean()) / own.std(), rtol=1e-5)
    assert scale.filled(x)[3, 0] == pytest.approx(own.mean(), rel=1e-5)


def test_finetuning_learns_what_the_frozen_encoder_shows():
    values, label = pictures(8)
    recipe = FinetuneRecipe(epochs=12, batch=8, lr=1e-3, head_lr=3e-2)
    probs = finetune(resnet(), values, label, np.arange(10), np.arange(10, 16), 2, 0, recipe)
    assert probs.shape == (6, 2) and (probs.argmax(1) == label[10:]).mean() >= 5 / 6
    again = finetune(resnet(), values, label, np.arange(10), np.arange(10, 16), 2, 0, recipe)
    np.testing.assert_array_equal(probs, again)


def test_sources_by_text(images, tmp_path):
    folder.save(tmp_path / "enc", RESNET, resnet(2).variables)
    x, _ = blobs(16)
    np.savez(tmp_path / "f.npz", one=x, two=x[:, :2])
    patches = dataclasses.replace(images, arrays={"own": x})
    texts = [
        str(tmp_path / "enc"),
        "floor=vit_tiny,image=32,patch=16,depth=2@random:3",
        f"{tmp_path}/f.npz:two",
        "array:own",
    ]
    found = open_sources(texts, patches)
    assert [source.label for source in found] == ["enc", "floor", "two", "own"]
    assert found[0].loaded.sha256 == resnet(2).sha256 and found[2].features.shape == (16, 2)
    assert found[1].marks == ("floor: random weights, not trained",) and found[0].marks == ()
    assert [source.label for source in open_sources([], patches)] == ["own"]
    cut = open_sources(["cut=resnet50,blocks=1,1,width=4,image=32@random:0"], patches)[0].loaded.encoder
    assert cut.spec.blocks == (1, 1) and cut.spec.width == 4


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        (["nowhere/"], "no encoder folder"),
        (["a=array:own", "a=array:own"], r"the names \['a'\] occur twice"),
        (["array:other"], r"has the arrays \['holes', 'own'\]"),
        (["array:holes"], "1 values are not finite, first patch 'p02', column 1.*--missing mean"),
        (["vit_tinny@random:0"], "encoder 'vit_tinny' is unknown"),
        (["vit_tiny@random:x"], "expected random:SEED"),
    ],
)
def test_sources_that_do_not_exist_are_refused(images, texts, named):
    x, _ = blobs(16)
    holes = x.copy()
    holes[2, 1] = np.nan
    with pytest.raises(ValueError, match=named):
        open_sources(texts, dataclasses.replace(images, arrays={"own": x, "holes": holes}))


def test_encoders_need_images_and_images_need_encoders():
    x, label = blobs(12)
    with pytest.raises(DataError, match="holds no images, only features"):
        open_sources(["vit_tiny,image=32,depth=1@random:0"], patches_of(None, label, arrays={"x": x}))
    values, label = pictures(2)
    with pytest.raises(DataError, match="name what to probe with --encoder"):
        open_sources([], patches_of(values, label))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"probes": ("linear", "svm")}, "--probes linear,svm"),
        ({"seeds": (1, 1)}, "--seeds"),
        ({"ks": (0,)}, "out of range"),
        ({"augment": "strong"}, "--augment strong"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        Settings(**changes)


def test_feature_arrays_cannot_be_fine_tuned_augmented_or_mapped(tmp_path):
    x, label = blobs(24)
    patches = patches_of(None, label, arrays={"x": x})
    options = {"computing": COMPUTING, "protocol": Protocol(folds=2)}
    for changes, maps, named in (
        ({"probes": ("finetune",)}, None, "cannot be fine-tuned: x"),
        ({"probes": ("mlp256",), "augment": "light"}, None, "needs images, x"),
        ({}, MapOptions(tmp_path / "m"), "feature arrays have no positions"),
    ):
        with pytest.raises(ValueError, match=named):
            run_probes(patches, open_sources([], patches), tmp_path, settings=Settings(**changes), maps=maps, **options)
    assert not (tmp_path / "embeddings").exists(), "refused before anything is written"


def test_titles():
    assert title_of("knn1@0.1") == "1 nearest neighbour, 10 % of the labels"
    assert title_of("linear@1") == "Linear probe"
    assert loading.RANDOM in resnet().weights
