"""Simulated pairs: the grade is plain in IHC and faint in H&E, and the data say that they are simulated."""

import numpy as np
import pytest

from data_pipelines.pairs.simulate import PairSpec, draw_pair, simulate_pairs


def grades_and_statistics(spec, n=120):
    grades = np.arange(n) % 4
    pairs = [draw_pair(spec, number, grade) for number, grade in enumerate(grades)]
    dark = np.array([(image[..., 0] < 160).mean() for image, _ in pairs])
    brown = np.array([np.percentile(other[..., 0].astype(int) - other[..., 2], 96) for _, other in pairs])
    return grades, dark, brown


def test_the_grade_is_plain_in_ihc_and_faint_in_he():
    grades, dark, brown = grades_and_statistics(PairSpec(size=32, noise=2.0))
    he, ihc = (abs(np.corrcoef(grades, x)[0, 1]) for x in (dark, brown))
    assert ihc > 0.8 and he < ihc - 0.2
    strong = grades_and_statistics(PairSpec(size=32, noise=2.0, he_signal=5.0))
    assert np.corrcoef(*strong[:2])[0, 1] > max(he, 0.4)


def test_without_signal_he_says_nothing():
    grades, dark, _ = grades_and_statistics(PairSpec(size=32, noise=2.0, he_signal=0.0), n=200)
    assert abs(np.corrcoef(grades, dark)[0, 1]) < 0.2


def test_the_data_set_is_marked_grouped_and_reproducible(tmp_path):
    spec = PairSpec(n_train=8, n_test=4, size=16, per_group=4, seed=3)
    first, second = (simulate_pairs(tmp_path / name, spec) for name in "ab")
    assert first.simulated and first.simulation["seed"] == 3 and first.class_names == ("0", "1+", "2+", "3+")
    assert first.fingerprint() == second.fingerprint()
    groups = [{e.group for e in first.examples if e.split == part} for part in ("train", "test")]
    assert [len(found) for found in groups] == [2, 1] and not groups[0] & groups[1]


def test_a_simulation_without_examples_is_refused():
    with pytest.raises(ValueError, match="n_test of a simulation is 0"):
        PairSpec(n_test=0)
