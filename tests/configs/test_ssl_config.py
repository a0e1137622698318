"""The named configurations of self-supervised pre-training and their sweep."""

import os

import pytest

from configs import ssl
from histokd_jax.methods import registry
from histokd_jax.methods.ssl import config as method_config
from histokd_jax.train import data_kinds, optim
from histokd_jax.utils import config

NAMED = {"ssl": "", "ssl_mfl": "mfl", "ssl_faithful": "faithful", "ssl_corrected": "corrected", "ssl_smoke": "smoke"}


@pytest.mark.parametrize("name", NAMED)
def test_resolved_text_is_as_recorded(name, golden_dir):
    """Rewrite after an intended change with UPDATE_GOLDEN=1, and read the difference before committing it."""
    text = config.to_json(config.load(f"configs/ssl.py:{NAMED[name]}")) + "\n"
    path = golden_dir / "configs" / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} differs; UPDATE_GOLDEN=1 rewrites it"


@pytest.mark.parametrize(
    "arg",
    [
        *NAMED.values(),
        "mfl,faithful,barlow",
        "unprivileged,infonce",
        "privileged_only,corrected",
        "vit,nct,bf16,fold=all",
    ],
)
def test_the_method_accepts_every_preset(arg):
    cfg = config.load(f"configs/ssl.py:{arg}")
    registry.method_module(cfg.method).validate(cfg)
    optim.check(cfg.train)
    assert data_kinds.kind_of(cfg) == data_kinds.PAIRS and cfg.task_kind == "representation"


def test_defaults_equal_those_of_the_method():
    ours, theirs = config.flatten(config.load("configs/ssl.py")), config.flatten(method_config.default_config())
    assert set(theirs) <= set(ours)
    assert {key: ours[key] for key in theirs} == theirs


def test_presets_equal_those_of_the_method():
    assert dict(ssl.FAITHFUL) == dict(method_config.FAITHFUL)
    assert dict(ssl.CORRECTED) == dict(method_config.CORRECTED)
    assert set(ssl.FAITHFUL) == set(ssl.CORRECTED)


def test_schedules_of_both_papers():
    mfl, trident = (config.load(f"configs/ssl.py:{word}") for word in ("mfl", "trident"))
    assert (mfl.layout.name, mfl.train.b, mfl.train.warmup_fraction) == ("privileged", 128, 0.001)
    assert (trident.layout.name, trident.train.b, trident.train.warmup_fraction) == ("trident", 256, 0.1)
    assert trident.train.clip_per_tensor == 1.0 and trident.train.adam_eps == 1e-7


@pytest.mark.parametrize("arg", ["mfl,trident", "barlow,infonce", "faithful,corrected", "byol"])
def test_contradictory_or_unknown_words_are_refused(arg):
    with pytest.raises(config.ConfigError, match="contradict each other|is not known"):
        config.load(f"configs/ssl.py:{arg}")


@pytest.mark.parametrize("words", ["", "all,smoke", "sources,views"])
def test_every_setting_of_the_sweep_is_possible(words):
    found, reference = config.load_sweep(f"configs/ablations/ssl.py:{words}")
    assert reference == "trident" and len(found) >= 4
    for name, cfg in found.items():
        registry.method_module(cfg.method).validate(cfg), name
