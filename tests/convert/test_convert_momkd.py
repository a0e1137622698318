"""Checkpoints of MoMKD through `histokd convert`: tensors used and dead, prediction, round trip."""

import golden_fill as gf
import numpy as np
import pytest

from data_pipelines.torch_file import read_state_dict, write_state_dict
from histokd_jax.cli.main import main
from histokd_jax.convert import models
from histokd_jax.convert.matching import ConversionError
from histokd_jax.utils import config

CONFIG = "configs/momkd.py:her2"


def golden(folder):
    state = {key: np.asarray(value, np.float32) for key, value in gf.state_dict(folder, "momkd").items()}
    return {**state, "mem_pos._codebook.cluster_size": np.zeros((1, 16), np.float32)}


def test_every_tensor_survives_the_way_in_and_out(golden_dir, tmp_path, capsys):
    state = golden(golden_dir)
    write_state_dict(tmp_path / "x.pt", state)
    out = str(tmp_path / "model")
    assert main(["convert", str(tmp_path / "x.pt"), "--config", CONFIG, "--out", out, "--classes", "neg,pos"]) == 0
    shown = capsys.readouterr().out
    assert "45 of 46 tensors used" in shown and "mem_pos._codebook.cluster_size" in shown
    assert "width 1536, 2 outputs" in shown
    assert main(["convert", out, "--to-torch", "--out", str(tmp_path / "back.pt")]) == 0
    back = read_state_dict(tmp_path / "back.pt")
    assert set(back) == set(state) - {"mem_pos._codebook.cluster_size"}
    for key, value in back.items():
        assert value.shape == state[key].shape and value.tobytes() == state[key].tobytes(), key


def test_widths_are_read_off_and_deviations_name_the_key(golden_dir, tmp_path):
    state = golden(golden_dir)
    write_state_dict(tmp_path / "x.pt", state)
    converted = models.from_checkpoints(config.load(CONFIG), {"": tmp_path / "x.pt"})
    assert (converted.spec.feat_dim, converted.spec.num_classes, converted.spec.num_genes) == (1536, 2, 768)
    write_state_dict(tmp_path / "y.pt", {k: v for k, v in state.items() if k != "attn_log_tau"})
    with pytest.raises(ConversionError, match="missing keys: attn_log_tau"):
        models.from_checkpoints(config.load(CONFIG), {"": tmp_path / "y.pt"})
    with pytest.raises(ConversionError, match="memory.update_by=gradient"):
        models.from_checkpoints(config.load(f"{CONFIG},fixed_memory"), {"": tmp_path / "x.pt"})
