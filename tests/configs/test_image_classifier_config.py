"""The named configurations of the image classifier."""

import os

import pytest

from configs import image_classifier
from histokd_jax.methods import registry
from histokd_jax.train import data_kinds
from histokd_jax.utils import config


@pytest.mark.parametrize("arg", ["", "smoke"])
def test_resolved_text_is_as_recorded(arg, golden_dir):
    """Rewrite after an intended change with UPDATE_GOLDEN=1, and read the difference before committing it."""
    text = config.to_json(config.load(f"configs/image_classifier.py:{arg}")) + "\n"
    path = golden_dir / "configs" / f"image_classifier{'_' if arg else ''}{arg}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} differs; UPDATE_GOLDEN=1 rewrites it"


@pytest.mark.parametrize("arg", ["", "partner", "both,smoke", "image,fold=0,seed=3"])
def test_the_method_accepts_every_preset(arg):
    cfg = config.load(f"configs/image_classifier.py:{arg}")
    registry.method_module(cfg.method).validate(cfg)
    assert data_kinds.kind_of(cfg) == data_kinds.PAIRS and cfg.infer.mode == cfg.model.inputs


def test_defaults_equal_those_of_the_method():
    ours = config.flatten(config.load("configs/image_classifier.py"))
    theirs = config.flatten(registry.method_module("image_classifier").default_config())
    assert {key: ours[key] for key in theirs} == theirs


def test_contradictory_words_are_refused():
    with pytest.raises(ValueError, match="several inputs: image, both"):
        image_classifier.get_config("image,both")
