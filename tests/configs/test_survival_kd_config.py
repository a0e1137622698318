"""configs/survival_kd.py: words, presets, and agreement with the method that reads them."""

import pytest

from configs import survival_kd
from histokd_jax.methods import registry
from histokd_jax.methods.survival_kd.config import default_config
from histokd_jax.utils import config

TABLE = ["distill.table=teacher.csv"]
ARGUMENTS = [
    "",
    *survival_kd.STUDENTS,
    *survival_kd.TEACHERS,
    "clam_sb,mcat,two_stage",
    "cox,snn",
    "cached,dsmil",
    "smoke",
]


def load(arg="", overrides=()):
    return config.load(f"configs/survival_kd.py:{arg}", list(overrides))


@pytest.mark.parametrize("arg", ARGUMENTS)
def test_the_method_accepts_every_preset(arg):
    registry.method_module("survival_kd").validate(load(arg, TABLE if "cached" in arg else ()))


def test_defaults_equal_those_of_the_method():
    ours, theirs = config.flatten(load()), config.flatten(default_config())
    # The trainer offers no cluster ids.
    theirs = {key: value for key, value in theirs.items() if ".deepattnmisl." not in key}
    assert set(theirs) <= set(ours), "the method reads keys that the named configuration lacks"
    assert {key: ours[key] for key in theirs} == theirs


@pytest.mark.parametrize(
    "arg,expected",
    [
        ("", {"student.name": "abmil", "teacher.name": "porpoise_mmf", "distill.schedule": "online"}),
        ("dsmil,snn", {"student.name": "dsmil", "teacher.name": "snn", "loss.teacher_l1": 1e-4, "loss.l1": 0.0}),
        ("mcat,two_stage", {"genes.kind": "groups", "distill.schedule": "two_stage", "student.abmil.fusion": "none"}),
        ("concat", {"teacher.name": "abmil", "teacher.abmil.fusion": "concat", "student.abmil.fusion": "none"}),
        ("cox", {"loss.survival": "cox", "loss.lambda_hazard": 0.0, "loss.lambda_order": 1.0}),
        ("cached", {"genes.kind": "none", "compare.control": True, "infer.mode": "pathology"}),
    ],
)
def test_words_choose_networks_and_schedule(arg, expected):
    flat = config.flatten(load(arg))
    assert {key: flat[key] for key in expected} == expected


@pytest.mark.parametrize("arg", ["abmil,dsmil", "snn,mcat", "online,cached", "cached,snn", "deepattnmisl"])
def test_contradictory_words_are_named(arg):
    with pytest.raises(ValueError, match="config argument"):
        survival_kd.get_config(arg)


def test_two_configurations_and_both_roles_share_nothing():
    first, second = survival_kd.get_config(), survival_kd.get_config()
    first.teacher.abmil.width = 8
    assert {second.teacher.abmil.width, first.student.abmil.width, survival_kd.NETWORKS["abmil"]["width"]} == {512}
