"""configs/supervised.py: words, presets, and agreement with the method that reads them."""

import pytest

from configs import supervised
from histokd_jax.methods import registry
from histokd_jax.methods.supervised.config import default_config
from histokd_jax.train import optim
from histokd_jax.utils import config

WORDS = (*supervised.NETWORKS, *supervised.VARIANTS)
ARGUMENTS = [*WORDS, *(f"{word},classification" for word in WORDS), "deepsets,mean,bilinear", "abmil,concat,smoke"]
PUBLISHED = (
    "snn",
    "deepsets",
    "abmil",
    "deepattnmisl,concat",
    "amil",
    "snn_porpoise",
    "transmil",
    "mcat",
    "porpoise_mmf",
    "survpath",
    "abmil_survpath",
    "snn_survpath",
)
CLASSIFIERS = ("clam_mb", "dsmil", "transmil")
ARGUMENTS += [f"{arg},published" for arg in PUBLISHED]
ARGUMENTS += [f"{arg},classification,published" for arg in CLASSIFIERS]


def load(arg=""):
    return config.load(f"configs/supervised.py:{arg}")


@pytest.mark.parametrize("arg", ARGUMENTS)
def test_the_method_accepts_every_preset(arg):
    cfg = load(arg)
    registry.method_module("supervised").validate(cfg)
    optim.check(cfg.train)


def test_defaults_equal_those_of_the_method():
    ours, theirs = config.flatten(load()), config.flatten(default_config())
    assert set(theirs) <= set(ours), "the method reads keys that the named configuration lacks"
    assert {key: ours[key] for key in theirs} == theirs


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
        ("transmil", {"infer.mode": "pathology", "genes.kind": "none", "survival.bins_from": "train_fold"}),
        ("mcat", {"model.mcat.fusion": "concat", "infer.mode": "both", "genes.kind": "groups", "loss.l1": 0.0}),
        ("mcat,bilinear", {"model.mcat.fusion": "bilinear", "genes.selection": "none"}),
        ("porpoise_mmf", {"infer.mode": "both", "genes.kind": "all", "loss.l1": 1e-5}),
        ("survpath", {"genes.kind": "groups", "loss.alpha": 0.5, "data.max_patches_train": 4096}),
        (
            "mcat,published",
            {
                "train.optimizer": "adam_l2",
                "train.lr_schedule": "constant",
                "train.lr": 2e-4,
                "train.wd": 1e-5,
                "train.b": 32,
                "train.max_epochs": 20,
                "train.sampler": "class_balanced_replacement",
                "survival.bins_from": "cohort",
                "split.protocol": "published",
                "early_stop.enabled": False,
                "loss.l1_scaling": "per_bag",
                "seed": 1,
            },
        ),
        ("snn,published,seed=4", {"loss.l1": 1e-4, "seed": 4}),
        (
            "dsmil,classification,published",
            {"train.betas": (0.5, 0.9), "train.lr_floor": 5e-6, "train.lr": 1e-4, "train.optimizer": "adam_l2"},
        ),
        (
            "survpath,published",
            {
                "train.optimizer": "radam",
                "train.lr_schedule": "warmup_cosine",
                "train.b": 1,
                "loss.alpha": 0.5,
                "train.sampler": "class_balanced_replacement",
                "data.max_patches_train": 4096,
                "model.survpath.padding": "faithful",
                "split.protocol": "published",
                "early_stop.enabled": False,
            },
        ),
        (
            "transmil,classification,published",
            {
                "train.optimizer": "lookahead_radam",
                "train.lr": 2e-4,
                "train.wd": 1e-5,
                "train.b": 2,
                "train.max_epochs": 200,
                "early_stop.patience": 10,
                "seed": 2021,
            },
        ),
        ("transmil,published", {"train.optimizer": "adam_l2", "train.b": 32, "seed": 1}),
        ("clam_sb,corrected", {"train.optimizer": "adamw", "split.protocol": "corrected"}),
    ],
)
def test_words_choose_network_and_recipe(arg, expected):
    flat = config.flatten(load(arg))
    assert {key: flat[key] for key in expected} == expected


REFUSED = ("published,corrected", "snn_corrected,published", "survpath,classification,published")


@pytest.mark.parametrize("arg", ["abmil,snn", "amil,clam_sb", "clam_sb,concat", "abmil,mean", "transformer", *REFUSED])
def test_contradictory_words_are_named(arg):
    with pytest.raises(ValueError, match="config argument"):
        supervised.get_config(arg)


def test_two_configurations_share_nothing():
    first, second = supervised.get_config("abmil"), supervised.get_config("abmil")
    first.model.abmil.width = 8
    assert second.model.abmil.width == 512 and supervised.NETWORKS["abmil"]["width"] == 512
