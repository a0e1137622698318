"""configs/distil.py: words, customary weights, and agreement with the method that reads them."""

import pytest

from configs import distil
from histokd_jax.losses.catalogue import CATALOGUE
from histokd_jax.methods import registry
from histokd_jax.methods.distil.config import REFUSED, default_config
from histokd_jax.utils import config

ARGUMENTS = ["", *distil.STUDENTS, *distil.TEACHERS, "classification,abmil,concat,terms=kd+sp", "two_stage", "smoke"]


def load(arg="", overrides=()):
    return config.load(f"configs/distil.py:{arg}", list(overrides))


@pytest.mark.parametrize("arg", ARGUMENTS)
def test_the_method_accepts_every_preset(arg):
    registry.method_module("distil").validate(load(arg))


def test_defaults_equal_those_of_the_method():
    ours, theirs = config.flatten(load("porpoise_mmf")), config.flatten(default_config())
    theirs = {key: value for key, value in theirs.items() if ".deepattnmisl." not in key and key != "terms"}
    assert set(theirs) <= set(ours), set(theirs) - set(ours)
    assert {key: ours[key] for key in theirs} == theirs


def test_weights_and_options_are_those_of_the_catalogue():
    for name, (weight, options) in distil.TERMS.items():
        assert name not in REFUSED and CATALOGUE[name].weight == weight
        left_out = {key for key, value in CATALOGUE[name].options.items() if value is None}
        assert {k: v for k, v in CATALOGUE[name].options.items() if k not in left_out} == options, name


def test_every_term_that_vectors_and_logits_allow_is_offered():
    possible = {name for name, e in CATALOGUE.items() if e.reads in ("logits", "vector")} - set(REFUSED)
    same = {"supervision_transfer", "vicreg_original"}  # another name, another convention of one that is offered
    assert possible - set(distil.TERMS) - same == {"ab", "cmd", "hsic"}, "pre-activations, bounded values, unbounded"


def test_unknown_terms_and_keys_are_refused():
    with pytest.raises(ValueError, match="terms='kd.magic'|expected NAME"):
        load("terms=kd+magic")
    with pytest.raises(ValueError, match="unknown config key 'terms.kd.weights'; did you mean terms.kd.weight"):
        load("classification,terms=kd", ["terms.kd.weights=1"])
