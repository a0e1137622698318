"""Defaults, the faithful preset, and refusal of unknown or contradictory switches."""

import mkd_setup as setup
import pytest

from histokd_jax.methods.mkd.config import CHOICES, FAITHFUL, default_config, lookup, objective_spec, validate
from histokd_jax.methods.mkd.objective import ObjectiveSpec
from histokd_jax.methods.registry import get_method, method_module
from histokd_jax.types import DataSpec

# Section 16 of the specification.
SECTION_16 = {
    "variant": "mkd",
    "fidelity": "corrected",
    "task": "ER",
    "data.feat_dim": 1024,
    "data.slide_choice": "first_sorted",
    "data.max_patches_train": None,
    "genes.top_k": 8192,
    "genes.token_size": 512,
    "genes.filter": "top",
    "genes.ranking": "cox",
    "genes.ranking_scope": "per_fold_train",
    "genes.normalisation": "precomputed_zscore",
    "genes.exclude": (),
    "split.stratify": True,
    "model.d": 256,
    "model.attn": 128,
    "model.dropout": 0.25,
    "fusion.type": "bilinear",
    "init.t_m": "torch_default",
    "teachers": ("M", "G"),
    "loss.lambda_coral": 1.0,
    "loss.lambda_or": 1.0,
    "loss.lambda_skd": 1.0,
    "loss.lambda_clod": 1.0,
    "mkd.alpha": 1 / 6,
    "mkd.or_form": "inner_abs_of_mean",
    "skd.scale": "b",
    "skd.stop_grad_teacher": False,
    "clod.temperature": 4.0,
    "distill.schedule": "online",
    "train.b": 16,
    "train.batching": "packed",
    "data.grouping": "size_balanced",
    "train.lr": 2e-4,
    "train.wd": 1e-5,
    "train.lr_schedule": "cosine50_floor0",
    "train.max_epochs": 100,
    "train.sampler": "class_balanced_replacement",
    "early_stop.monitor": "mean_auc3",
    "early_stop.patience": 5,
    "early_stop.min_epoch": 5,
    "ckpt.teachers": "best_joint",
    "eval.teacher_dropout": False,
    "infer.mode": "pathology",
}


@pytest.mark.parametrize("key", SECTION_16)
def test_default_is_that_of_the_specification(key):
    assert lookup(default_config(), key) == SECTION_16[key]


def test_defaults_validate_and_agree_with_the_objective():
    config = default_config()
    validate(config)
    assert objective_spec(config) == ObjectiveSpec()


def test_faithful_preset_validates_and_sets_every_quirk():
    config = default_config()
    config.update_from_flattened_dict(dict(FAITHFUL))
    validate(config)
    quirks = {"eval.teacher_dropout", "ckpt.teachers", "train.lr_schedule", "split.stratify", "genes.ranking_scope"}
    quirks |= {"data.slide_choice", "data.grouping", "fidelity"}
    assert set(FAITHFUL) == quirks
    assert all(lookup(default_config(), k) != v for k, v in FAITHFUL.items())


def test_null_keys_are_independent():
    config = default_config()
    config.genes.clip = 5.0
    assert config.model.gene_dropout is None


@pytest.mark.parametrize("key", CHOICES)
def test_unknown_value_lists_the_allowed_ones(key):
    config = default_config()
    config.update_from_flattened_dict({key: "nonsense"})
    with pytest.raises(ValueError, match=f"{key}.*{CHOICES[key][0]}"):
        validate(config)


CONTRADICTIONS = [
    ({"clod.temperature": 0.0}, "temperature > 0"),
    ({"teachers": ()}, "teachers is empty"),
    ({"teachers": ("M", "M")}, "without repetition"),
    ({"teachers": ("X",)}, "selection"),
    ({"genes.top_k": 1000}, "not divisible"),
    ({"train.b": 1}, "train.b >= 2"),
    ({"loss.lambda_skd": -1.0}, "weight >= 0"),
    ({"model.dropout": 1.0}, r"\[0, 1\)"),
    ({"model.gene_dropout": -0.1}, r"\[0, 1\)"),
    ({"genes.clip": 0.0}, "bound > 0"),
    ({"variant": "gmkdn", "fusion.type": "concat"}, "bilinear"),
    ({"infer.mode": "both", "teachers": ("G",)}, "needs teacher 'M'"),
    ({"inter_loss": "crd"}, "memory banks"),
    ({"inter_loss": "at"}, "identically zero"),
]


@pytest.mark.parametrize("overrides,message", CONTRADICTIONS)
def test_contradictory_switches_are_refused(overrides, message):
    config = default_config()
    config.update_from_flattened_dict(overrides)
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_two_stage_without_teachers_is_refused():
    config = default_config()
    config.update_from_flattened_dict({"teachers": (), "distill.schedule": "two_stage"})
    for key in config.loss:
        config.loss[key] = 0.0
    with pytest.raises(ValueError, match="two_stage"):
        validate(config)


def test_control_without_distillation_accepts_one_slide_per_step():
    config = default_config()
    config.train.b = 1
    for key in config.loss:
        config.loss[key] = 0.0
    validate(config)
    assert not get_method("mkd")(config, DataSpec(1024, 2, 8192)).batch_coupled


@pytest.mark.parametrize(
    "data,message",
    [
        (DataSpec(setup.FEAT + 1, 2, setup.GENES), "feat_dim"),
        (DataSpec(setup.FEAT, 1, setup.GENES), "2 classes"),
        (DataSpec(setup.FEAT, 2, setup.GENES + 1), "token_size"),
    ],
)
def test_data_that_does_not_fit_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        get_method("mkd")(setup.small_config(), data)


def test_missing_key_is_named():
    config = default_config()
    del config["skd"]
    with pytest.raises(ValueError, match="skd"):
        validate(config)


def test_registry_refuses_an_unknown_method():
    with pytest.raises(ValueError, match="mkd"):
        get_method("mdk")
    assert method_module("mkd").default_config().variant == "mkd"
