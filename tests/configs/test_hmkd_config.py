"""configs/hmkd.py: recorded text, words, presets, and agreement with the method that reads them."""

import os

import pytest

from configs import hmkd
from configs.ablations import hmkd as ablations
from histokd_jax.methods import registry
from histokd_jax.methods.hmkd import config as method_config
from histokd_jax.utils import config

NAMED = {"hmkd": "", "hmkd_corrected": "corrected", "hmkd_teacher": "teacher", "hmkd_smoke": "smoke"}
TEACHER = ["distill.teacher=runs/teacher/fold_0/model"]
WEIGHTS = ("loss.kd_weight", "loss.at_weight", "loss.cos_weight")


def load(arg="", overrides=()):
    return config.load(f"configs/hmkd.py:{arg}", list(overrides))


@pytest.mark.parametrize("name", NAMED)
def test_resolved_text_is_as_recorded(name, golden_dir):
    """Rewrite after an intended change with UPDATE_GOLDEN=1, and read the difference before committing it."""
    text = config.to_json(load(NAMED[name])) + "\n"
    path = golden_dir / "configs" / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} differs; UPDATE_GOLDEN=1 rewrites it"


@pytest.mark.parametrize("arg", ["", *hmkd.WORDS, "corrected,kl,smoke", "attention,cosine", "cached,bf16"])
def test_the_method_accepts_every_preset(arg):
    registry.method_module("hmkd").validate(load(arg, TEACHER if "cached" in arg else ()))


def test_defaults_equal_those_of_the_method():
    ours, theirs = config.flatten(load()), config.flatten(method_config.default_config())
    assert set(theirs) <= set(ours), "the method reads keys that the named configuration lacks"
    assert {key: ours[key] for key in theirs} == theirs


def test_presets_equal_those_of_the_method():
    assert dict(hmkd.FAITHFUL) == dict(method_config.FAITHFUL)
    assert {**method_config.CORRECTED, "split.val_fraction": 0.1} == dict(hmkd.CORRECTED)


@pytest.mark.parametrize(
    "arg,weights",
    [
        ("", (1, 1, 1)),
        ("student", (0, 0, 0)),
        ("kl", (1, 0, 0)),
        ("attention,cosine", (0, 1, 1)),
        ("teacher", (1, 1, 1)),
    ],
)
def test_words_choose_the_terms(arg, weights):
    flat = config.flatten(load(arg))
    assert tuple(flat[key] for key in WEIGHTS) == weights
    assert flat["infer.mode"] == ("he+ihc" if arg == "teacher" else "he")


@pytest.mark.parametrize("arg", ["teacher,student", "faithful,corrected", "student,kl", "teacher,cached"])
def test_contradictory_words_are_named(arg):
    with pytest.raises(ValueError, match="contradict each other"):
        hmkd.get_config(arg)


def test_ablations_are_settings_of_known_keys():
    base, settings = ablations.get_sweep("all,corrected")
    assert base == "configs/hmkd.py:corrected" and settings[ablations.REFERENCE] == {}
    assert {"student_alone", "kl_only", "attention_only", "cosine_only"} <= set(settings)
    for changes in settings.values():
        registry.method_module("hmkd").validate(config.load(base, [f"{k}={v}" for k, v in changes.items()]))
    assert set(ablations.get_sweep()[1]) == {"all_terms", *ablations.FAMILIES["terms"]}


@pytest.mark.parametrize(
    "change,message",
    [
        ("data.flip_mode=both", "data.flip_mode = 'both'"),
        ("model.attention_axis=channel", "expected one of \\('token',\\)"),
        ("model.widths=(40, 96, 224, 30)", "model.widths"),
        ("model.local_kernels=(1, 2)", "odd sides"),
        ("loss.at_maps=('c',)", "loss.at_maps"),
        ("loss.kd_weight=-1.0", "a weight >= 0"),
        ("loss.class_weights=balanced", "needs loss.class_counts"),
        ("train.b=1", "at least 2"),
        ("train.drop_last=False", "train.drop_last"),
        ("distill.schedule=cached", "give distill.teacher"),
        ("norm.running_var=none", "norm.running_var"),
        ("data.augment=more", "data.augment = 'more'"),
    ],
)
def test_impossible_settings_are_refused_with_key_and_way_out(change, message):
    with pytest.raises(ValueError, match=message):
        registry.method_module("hmkd").validate(load("", [change]))
