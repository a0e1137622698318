"""The named configuration of G-HANet: presets, agreement with the method, ablations as switches."""

import pytest

from configs import ghanet
from configs.ablations import ghanet as ablations
from histokd_jax.methods import registry
from histokd_jax.methods.ghanet import config as method_config
from histokd_jax.utils import config

WORDS = ("", "faithful", "corrected", "blca,faithful", "ucec", "luad,fold=2", "wsi_only", "smoke", "brca,seed=3")


@pytest.mark.parametrize("arg", WORDS)
def test_the_method_accepts_every_preset(arg):
    registry.method_module("ghanet").validate(config.load(f"configs/ghanet.py:{arg}"))


def test_defaults_equal_those_of_the_method():
    ours, theirs = config.flatten(config.load("configs/ghanet.py")), config.flatten(method_config.default_config())
    assert set(theirs) <= set(ours), "the method reads keys that the named configuration lacks"
    assert {key: ours[key] for key in theirs} == theirs


def test_faithful_preset_equals_that_of_the_method():
    assert dict(ghanet.METHOD_FAITHFUL) == dict(method_config.FAITHFUL)


def test_every_deviation_with_an_option_has_its_key():
    """D1, D3 to D6, D8 to D10, D12, D14, D16, D18, D19, D26 of section 11, and the switches of section 9."""
    flat = config.flatten(config.load("configs/ghanet.py"))
    keys = (
        "data.metadata survival.bins_from genes.select_on genes.correction genes.empty_group cab.second_attention "
        "hsb.map_source hsb.detach_map hsb.min_k train.lr_schedule loss.ce_clamp split.protocol train.remainder "
        "hsb.prenorm cab.enabled cab.passes cab.fusion cab.detach_tokens hsb.map hsb.ratio hsb.map_pass "
        "hsb.hyper_layer hsb.self_attention hsb.ffn hsb.readout loss.rec_weight loss.rec_terms loss.sce_power "
        "genes.selection model.tokens data.max_patches_train data.missing_slides"
    )
    assert set(keys.split()) <= set(flat)
    faithful = config.flatten(config.load("configs/ghanet.py:faithful"))
    assert {k for k in ghanet.FAITHFUL if flat[k] != faithful[k]} >= set(method_config.FAITHFUL)


def test_words_and_settings_are_read():
    cfg = ghanet.get_config("BLCA, fold=3,seed=7,wsi_only")
    assert (cfg.task, cfg.fold, cfg.seed, cfg.loss.rec_weight) == ("OS_BLCA", "3", 7, 0.0)
    assert (cfg.method, cfg.task_kind, cfg.train.b, cfg.train.max_epochs) == ("ghanet", "survival", 32, 20)
    with pytest.raises(ValueError, match="exclude each other"):
        ghanet.get_config("faithful,corrected")
    with pytest.raises(ValueError, match="blca, brca"):
        ghanet.get_config("kirc")


@pytest.mark.parametrize("words", ["", "all", "all,faithful", "all,ucec,faithful", "genes,patches,smoke"])
def test_ablations_are_distinct_settings_that_the_method_accepts(words):
    settings, reference = config.load_sweep(f"configs/ablations/ghanet.py:{words}")
    assert reference == "full"
    for name, cfg in settings.items():
        registry.method_module("ghanet").validate(cfg)
        assert (name == "full") == (config.flatten(cfg) == config.flatten(settings["full"]))


def test_every_switch_of_section_9_is_ablated():
    """But for groups of other genes and the number of tokens, which need another file of signatures."""
    changed = {key for family in ablations.FAMILIES.values() for changes in family.values() for key in changes}
    keys = (
        "cab.enabled cab.passes cab.second_attention cab.fusion cab.detach_tokens hsb.map hsb.ratio hsb.detach_map "
        "hsb.map_source hsb.map_pass hsb.hyper_layer hsb.self_attention hsb.ffn hsb.readout loss.rec_weight "
        "loss.rec_terms loss.sce_power genes.selection genes.correction data.max_patches_train"
    )
    assert set(keys.split()) <= changed
    assert {
        c["loss.rec_weight"] for f in ablations.FAMILIES.values() for c in f.values() if "loss.rec_weight" in c
    } == {
        0.0,
        0.1,
        0.5,
        1.0,
    }


@pytest.mark.parametrize(
    "key,value",
    [
        ("hsb.map", "all"),
        ("cab.passes", 3),
        ("hsb.ratio", 1.5),
        ("hsb.min_k", -1),
        ("model.dropout", 1.0),
        ("model.dim", 7),
        ("loss.rec_weight", -0.1),
        ("loss.alpha", 2.0),
        ("genes.p", 0.0),
        ("genes.clip", -1.0),
        ("genes.selection", "anova"),
    ],
)
def test_bad_values_are_named(key, value):
    cfg = method_config.default_config()
    cfg.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=f"{key} = "):
        method_config.validate(cfg)
