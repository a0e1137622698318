"""configs/supervised.py: words, presets, and agreement with the method that reads them."""

import pytest

from configs import supervised
from histokd_jax.methods import registry
from histokd_jax.methods.supervised.config import default_config
from histokd_jax.utils import config

WORDS = (*supervised.NETWORKS, *supervised.VARIANTS)
ARGUMENTS = [*WORDS, *(f"{word},classification" for word in WORDS), "deepsets,mean,bilinear", "abmil,concat,smoke"]


def load(arg=""):
    return config.load(f"configs/supervised.py:{arg}")


@pytest.mark.parametrize("arg", ARGUMENTS)
def test_the_method_accepts_every_preset(arg):
    registry.method_module("supervised").validate(load(arg))


def test_defaults_equal_those_of_the_method():
    ours, theirs = config.flatten(load()), config.flatten(default_config())
    own = {key for key in theirs if key.split(".")[1] in supervised.NETWORKS or not key.startswith("model.")}
    assert own <= set(ours), "the method reads keys that the named configuration lacks"
    assert {key: ours[key] for key in own} == {key: theirs[key] for key in own}


@pytest.mark.parametrize(
    "arg,expected",
    [
        ("", {"model.name": "abmil", "task_kind": "survival", "infer.mode": "pathology", "genes.kind": "none"}),
        ("snn", {"loss.l1": 1e-4, "loss.l1_scaling": "per_bag", "infer.mode": "genomics", "genes.kind": "all"}),
        ("abmil,bilinear", {"model.abmil.fusion": "bilinear", "infer.mode": "both", "genes.kind": "all"}),
        ("amil", {"model.name": "abmil", "model.abmil.rho": 0, "model.abmil.init": "xavier_normal"}),
        ("dsmil", {"loss.classification": "ce", "train.max_epochs": 20}),
        ("dsmil,classification", {"loss.classification": "bce", "train.wd": 1e-3, "train.max_epochs": 50}),
        ("clam_mb,classification", {"train.lr": 1e-4, "early_stop.patience": 20, "early_stop.min_epoch": 50}),
        ("snn_survpath", {"model.snn.widths": (256, 256), "loss.alpha": 0.5}),
    ],
)
def test_words_choose_network_and_recipe(arg, expected):
    flat = config.flatten(load(arg))
    assert {key: flat[key] for key in expected} == expected


@pytest.mark.parametrize("arg", ["abmil,snn", "amil,clam_sb", "clam_sb,concat", "abmil,mean", "transformer"])
def test_contradictory_words_are_named(arg):
    with pytest.raises(ValueError, match="config argument"):
        supervised.get_config(arg)


def test_two_configurations_share_nothing():
    first, second = supervised.get_config("abmil"), supervised.get_config("abmil")
    first.model.abmil.width = 8
    assert second.model.abmil.width == 512 and supervised.NETWORKS["abmil"]["width"] == 512
