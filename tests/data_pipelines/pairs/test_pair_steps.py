"""Planned steps of image pairs and the host batches they become."""

import numpy as np
import pair_files
import pytest

from data_pipelines import schema
from data_pipelines.errors import DataError
from data_pipelines.pairs.cohort import labelled_rows, official_split, pair_cohort, with_unlabelled
from data_pipelines.pairs.folder import open_reader
from data_pipelines.pairs.reader import PairReader
from data_pipelines.pairs.steps import IMAGE, VECTOR, PairSource, plan_evaluation, plan_training
from data_pipelines.pipeline import SlideTable, StepIterator, make_eval_dataset
from data_pipelines.splits import make_folds


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """11 training and 5 test pairs, one of them without partner; id -> pixels, and the reader."""
    root = tmp_path_factory.mktemp("pairs")
    images = pair_files.bci(root / "s", train=11, test=5)
    (root / "s/train/IHC/00003_train_3+.png").unlink()
    manifest = pair_files.imported(root / "s", root / "out", missing_partner="keep").manifest
    return images, PairReader(manifest)


def source(reader, plan, partner=IMAGE):
    cohort = pair_cohort(reader.manifest)
    fields = {schema.LABEL: np.maximum(cohort.label, 0), schema.HAS_LABEL: cohort.label >= 0}
    return PairSource(reader, SlideTable(cohort.slide_index, fields), plan, partner)


def test_every_epoch_holds_every_example_once_in_an_order_of_its_own():
    plan = plan_training(11, None, batch=4, epochs=3, seed=5, drop_last=False)
    assert plan.slide.shape == (3, 3, 4) and plan.fill() == 11 / 12
    epochs = [plan.slide[e].reshape(-1) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch[epoch >= 0]) == list(range(11)) and epoch[-1] == -1
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = plan_training(11, None, batch=4, epochs=3, seed=5, drop_last=False)
    assert again.fingerprint() == plan.fingerprint()
    assert plan_training(11, None, batch=4, epochs=3, seed=6, drop_last=False).fingerprint() != plan.fingerprint()


def test_the_last_incomplete_step_is_dropped_as_the_release_does():
    plan = plan_training(11, None, batch=4, epochs=2, seed=0)
    assert plan.slide.shape == (2, 2, 4) and plan.fill() == 1.0
    assert len(np.unique(plan.slide[0])) == 8
    with pytest.raises(ValueError, match="train.b is 12 but there are only 11 training examples"):
        plan_training(11, None, batch=12, epochs=1, seed=0)


def test_the_balanced_sampler_draws_every_class_alike():
    labels = np.repeat([0, 1], [90, 10])
    plan = plan_training(100, labels, batch=10, epochs=20, seed=0, sampler="class_balanced_replacement")
    assert abs(labels[plan.slide.reshape(-1)].mean() - 0.5) < 0.05


def test_a_batch_holds_the_pixels_labels_and_numbers_of_its_examples(data):
    images, reader = data
    plan = plan_evaluation(16, 6)
    found = source(reader, plan)
    batches = list(make_eval_dataset(found, num_threads=2))
    assert len(batches) == 3
    for name, (shape, dtype) in found.shapes().items():
        assert all(b[name].shape == shape and b[name].dtype == dtype for b in batches), name
    joined = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    for row, example in enumerate(reader.manifest.examples):
        image, partner = images[example.example_id]
        np.testing.assert_array_equal(joined["image"][row], image)
        np.testing.assert_array_equal(joined["partner"][row], partner if example.has_partner else 0 * partner)
        assert joined["label"][row] == example.label and joined["has_partner"][row] == bool(example.has_partner)
        assert joined["example"][row] == joined["slide_index"][row] == row
    assert joined["weight"].tolist() == [1.0] * 16 + [0.0] * 2 and joined["slide_index"][16:].tolist() == [-1, -1]
    assert not joined["image"][16:].any() and not joined["has_label"][16:].any()


def test_steps_are_equal_for_any_threads_processes_and_start(data):
    reader = data[1]
    found = source(reader, plan_training(16, None, batch=4, epochs=2, seed=3))
    whole = list(StepIterator(found, num_threads=0))
    iterator = StepIterator(found, start_step=3, num_threads=3)
    for expected in whole[3:]:
        batch = next(iterator)
        assert all((batch[name] == expected[name]).all() for name in expected)
    state = {"next_step": 5, "fingerprint": found.fingerprint()}
    iterator.set_state(state)
    np.testing.assert_array_equal(next(iterator)["image"], whole[5]["image"])
    halves = [next(StepIterator(found, num_threads=1, process_index=p, process_count=2)) for p in range(2)]
    for name in whole[0]:
        np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), whole[0][name])
    with pytest.raises(ValueError, match="cannot resume"):
        iterator.set_state({**state, "fingerprint": "0" * 64})


def test_a_vector_can_be_the_partner(tmp_path):
    pair_files.bci(tmp_path / "s", train=2, test=1)
    np.savez(tmp_path / "v.npz", example_id=["00000_train_0", "00000_test_0"], values=np.ones((2, 3), np.float32))
    manifest = pair_files.imported(tmp_path / "s", tmp_path / "out", vectors=str(tmp_path / "v.npz")).manifest
    batch = next(iter(make_eval_dataset(source(PairReader(manifest), plan_evaluation(3, 3), VECTOR))))
    assert batch["partner"].tolist() == [[1] * 3, [0] * 3, [1] * 3] and batch["has_partner"].tolist() == [1, 0, 1]
    assert batch["partner"].dtype == np.float32


def test_a_partner_that_the_data_do_not_have_is_refused(data):
    with pytest.raises(ValueError, match="no partner vectors"):
        source(data[1], plan_evaluation(16, 6), VECTOR)


def test_a_folder_is_read_like_a_data_set_without_labels(data, tmp_path):
    images = pair_files.bci(tmp_path, train=2, test=2)
    reader = open_reader(tmp_path)
    assert reader.manifest.class_names == () and len(reader.manifest.examples) == 4
    batch = next(iter(make_eval_dataset(source(reader, plan_evaluation(4, 4)))))
    for row, example in enumerate(reader.manifest.examples):
        np.testing.assert_array_equal(batch["partner"][row], images[example.example_id][1])
    first = reader.manifest.fingerprint()
    pair_files.write(tmp_path / "train/HE/00000_train_0.png", pair_files.encoded(pair_files.noise(9))[:-20])
    reader = open_reader(tmp_path)
    assert reader.manifest.fingerprint() != first
    with pytest.raises(DataError, match=r"00000_train_0\.png: truncated image"):
        reader.read(0)


def tabled(tmp_path, rows):
    """An imported table; every image is the same."""
    pair_files.write(tmp_path / "i.png", pair_files.noise(0))
    lines = ["example_id,he_path,label,group,split", *(f"{key},i.png,{rest}" for key, rest in rows.items())]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    return pair_files.imported(tmp_path / "t.csv", tmp_path / "out").manifest


OFFICIAL = {
    **{f"a{i}": f"{i % 2},g{i // 2},train" for i in range(16)},
    **{f"b{i}": f"{i % 2},h{i},test" for i in range(4)},
    "u0": ",,train",
    "u1": ",g0,train",
    "u2": ",,test",
}


def test_the_official_parts_hold_out_groups_and_unlabelled_examples_only_train(tmp_path):
    manifest = tabled(tmp_path, OFFICIAL)
    cohort = pair_cohort(manifest, "grade")
    split = official_split(manifest, cohort, val_fraction=0.25, stratify=True, seed=0)
    ids = {part: {cohort.slide_id[row] for row in getattr(split, part)} for part in ("train", "val", "test")}
    assert ids["test"] == {"b0", "b1", "b2", "b3"} and len(ids["val"]) == 4
    groups = {part: {OFFICIAL[key].split(",")[1] for key in keys} for part, keys in ids.items()}
    assert not groups["val"] & groups["train"] and "u0" in ids["train"] and "u2" not in ids["train"] | ids["val"]
    assert ("u1" in ids["train"]) == ("g0" not in groups["val"])
    published = official_split(manifest, cohort, val_fraction=0.25, stratify=True, seed=0, protocol="published")
    assert published.val_is_test and (published.val == published.test).all() and len(published.train) == 18


def test_a_group_in_two_official_parts_is_refused_with_the_ways_out(tmp_path):
    manifest = tabled(tmp_path, {**OFFICIAL, "c": "0,g3,test"})
    cohort = pair_cohort(manifest)
    with pytest.raises(DataError, match=r"'g3' is in (train|val) and in test.*data.official_split=False.*marked"):
        official_split(manifest, cohort, val_fraction=0.25, stratify=True, seed=0)
    options = {"val_fraction": 0.25, "stratify": True, "seed": 0}
    assert official_split(manifest, cohort, allow_patient_overlap=True, **options).patient_overlap


def test_folds_by_group_put_unlabelled_examples_into_training(tmp_path):
    manifest = tabled(tmp_path, OFFICIAL)
    cohort = pair_cohort(manifest)
    kept = labelled_rows(cohort)
    folds = [with_unlabelled(split, cohort, kept) for split in make_folds(cohort.subset(kept), n_folds=2)]
    for split in folds:
        held = {cohort.case_id[row] for part in (split.val, split.test) for row in part}
        assert not held & {cohort.case_id[row] for row in split.train}
        assert {"u0", "u2"} <= {cohort.slide_id[row] for row in split.train}


def test_data_without_labels_or_parts_say_so(tmp_path):
    manifest = tabled(tmp_path, {"a": ",,train", "b": ",,test"})
    cohort = pair_cohort(manifest)
    with pytest.raises(DataError, match="no example of the data set has a label"):
        official_split(manifest, cohort, val_fraction=0.0, stratify=True, seed=0)
    with pytest.raises(DataError, match="has no labels"):
        pair_cohort(manifest, labelled=True)
