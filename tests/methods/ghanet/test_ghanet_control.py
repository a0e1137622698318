"""The control arm of G-HANet is the same network without reconstruction."""

from histokd_jax.train.run import control_config
from histokd_jax.utils import config


def test_control_arm_has_no_reconstruction():
    cfg = config.load("configs/ghanet.py:blca")
    control = control_config(cfg)
    assert cfg.loss.rec_weight > 0 and control.loss.rec_weight == 0.0
    assert control.model.to_dict() == cfg.model.to_dict() and not control.compare.control


def test_a_run_without_reconstruction_has_no_control():
    assert control_config(config.load("configs/ghanet.py:blca,wsi_only")) is None
