"""Splits of labelled patches: groups stay together, official parts count, leakage is said."""

import dataclasses

import numpy as np
import pytest
from labelled_setup import blobs, patches_of

from data_pipelines.errors import DataError
from data_pipelines.labelled import parts as module
from data_pipelines.labelled.parts import Protocol, check_fractions, label_subsets, split


def toy(n=24, classes=2, **changes):
    return patches_of(label=np.arange(n) % classes, **changes)


def grouped(n=24, size=4):
    """Groups of `size` patches of one class."""
    order = np.argsort(np.arange(n) % 2, kind="stable")
    group = np.empty(n, object)
    for place, row in enumerate(order):
        group[row] = f"g{place // size}"
    return toy(n, group=tuple(group))


def test_folds_keep_groups_together_and_test_every_patch_once():
    patches = grouped()
    found = split(patches, Protocol(folds=3))
    assert found.kind == module.GROUPS and found.unit_name == "groups" and not found.marks
    group = np.array(patches.group)
    for fold in found.folds:
        assert not set(group[fold.train]) & set(group[fold.test])
        assert set(patches.label[fold.test]) == {0, 1}
    tested = np.concatenate([fold.test for fold in found.folds])
    assert sorted(tested.tolist()) == list(range(24))


def test_a_patch_without_a_group_is_its_own_and_the_number_is_told():
    patches = grouped()
    patches = dataclasses.replace(patches, group=("", "", *patches.group[2:]))
    found = split(patches, Protocol(folds=3))
    assert found.notes == ("2 patches without a group are groups of their own",) and found.unit[0] == "patch p00"


def test_too_few_groups_for_the_folds_say_what_is_possible():
    with pytest.raises(DataError, match=r"too few groups for --folds 5: .*'class 0': 3.*at most --folds 3"):
        split(grouped(), Protocol())


def test_without_groups_folds_are_stratified_and_leakage_is_said():
    found = split(toy(20), Protocol())
    assert found.kind == module.PATCHES and "leakage cannot be excluded" in found.marks[0]
    assert [len(fold.test) for fold in found.folds] == [4] * 5


def test_a_published_order_gives_contiguous_blocks_within_each_class():
    n = 60
    order = np.random.default_rng(0).permutation(n)
    patches = toy(n, order=order)
    found = split(patches, Protocol(folds=3, block=4))
    assert found.kind == module.BLOCKS and "contiguous blocks" in found.marks[0]
    for fold in found.folds:
        for c in range(2):
            place = np.argsort(np.argsort(order[patches.label == c]))
            rows = place[np.isin(np.flatnonzero(patches.label == c), fold.test)]
            assert sorted(rows) == list(range(min(rows), min(rows) + len(rows)))
    sizes = np.unique(found.unit, return_counts=True)[1]
    assert sizes.max() == 4
    for unit in set(found.unit):
        rows = np.flatnonzero(np.array(found.unit) == unit)
        assert sum(np.isin(rows, fold.test).any() for fold in found.folds) == 1, "a block in two folds"


def test_official_parts_are_used_and_val_is_left_out():
    part = ("train",) * 12 + ("val",) * 4 + ("test",) * 8
    found = split(toy(part=part), Protocol())
    assert found.kind == module.OFFICIAL and len(found.folds) == 1
    assert found.folds[0].train.tolist() == list(range(12)) and found.folds[0].test.tolist() == list(range(16, 24))
    assert "4 patches of no part, or of val, are not used" in found.notes[0]
    assert split(toy(part=part), Protocol(official=False)).kind == module.PATCHES


def test_a_group_in_both_official_parts_is_refused_or_marked():
    part, group = ("train",) * 12 + ("test",) * 12, ("s1",) * 13 + ("s2",) * 11
    patches = toy(part=part, group=group)
    with pytest.raises(DataError, match="1 groups lie in the training and in the test part.*'s1'.*--allow-overlap"):
        split(patches, Protocol())
    assert "no estimate for new patients" in split(patches, Protocol(allow_overlap=True)).marks[-1]


def test_official_parts_without_a_test_part_are_refused():
    with pytest.raises(DataError, match="a probe needs train and test.*--no-official-parts"):
        split(toy(part=("train",) * 24), Protocol())


def test_a_class_that_is_tested_but_never_trained_is_named():
    part = tuple("train" if i % 3 < 2 else "test" for i in range(24))
    with pytest.raises(DataError, match=r"tests the classes \['class 2'\]"):
        split(toy(classes=3, part=part), Protocol())


def test_identical_contents_in_training_and_test_are_counted():
    patches = toy(20)
    same = (*patches.digest[:-1], patches.digest[0])
    found = split(dataclasses.replace(patches, digest=same), Protocol(folds=5, seed=1))
    shared = module.shared_contents(dataclasses.replace(patches, digest=same), found)
    assert shared in (0, 2) and bool(shared) == any("identical" in mark for mark in found.marks)
    part = ("train",) * 10 + ("test",) * 10
    told = split(dataclasses.replace(patches, digest=same, part=part), Protocol()).marks
    assert "1 tested patches are identical to a training patch" in told


def test_label_subsets_are_nested_stratified_and_seeded():
    _, label = blobs(300, classes=3)
    label = np.where(np.arange(300) < 200, 0, label).astype(np.int32)
    rows = np.arange(10, 300)
    found = label_subsets(label, rows, (1.0, 0.5, 0.1, 0.001), [3, 0])
    assert found[1.0].tolist() == rows.tolist()
    for larger, smaller in ((1.0, 0.5), (0.5, 0.1), (0.1, 0.001)):
        assert set(found[smaller]) < set(found[larger])
    whole = np.bincount(label[rows])
    np.testing.assert_array_equal(np.bincount(label[found[0.1]]), np.floor(0.1 * whole + 0.5))
    assert np.bincount(label[found[0.001]]).tolist() == [1, 1, 1]
    again = label_subsets(label, rows, (0.1,), [3, 0])[0.1]
    np.testing.assert_array_equal(again, found[0.1])
    assert label_subsets(label, rows, (0.1,), [4, 0])[0.1].tolist() != again.tolist()


@pytest.mark.parametrize("fractions", [(), (0.0,), (1.5,), (0.1, 0.1)])
def test_fractions_outside_are_refused(fractions):
    with pytest.raises(DataError, match="--fractions"):
        check_fractions(fractions)
