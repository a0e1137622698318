"""Batch-coupled losses see the global batch: 1 device = 8 devices = 2 processes x 4 devices."""

import pathlib

import group
import numpy as np
import pytest
from gradient_worker import loss_and_gradients


def assert_equal_to_tolerance(want, got):
    assert want.keys() == got.keys() and len(want) > 20
    scale = max(np.abs(leaf).max() for leaf in want.values())
    for name, leaf in want.items():
        np.testing.assert_allclose(got[name], leaf, rtol=1e-4, atol=2e-6 * max(scale, 1), err_msg=name)


@pytest.fixture(scope="module")
def one_device(cohort_dir):
    return loss_and_gradients(cohort_dir, 1)


def test_eight_devices(cohort_dir, one_device):
    assert_equal_to_tolerance(one_device, loss_and_gradients(cohort_dir, 8))


@pytest.mark.multiprocess
def test_two_processes_of_four_devices(cohort_dir, one_device, tmp_path):
    worker, out = pathlib.Path(__file__).with_name("gradient_worker.py"), tmp_path / "gradients.npz"
    with group.Group([[str(worker), str(cohort_dir), str(out)]] * 2) as processes:
        assert processes.wait(90) == [0, 0], (processes.said(0), processes.said(1))
    with np.load(out) as found:
        assert_equal_to_tolerance(one_device, dict(found))
