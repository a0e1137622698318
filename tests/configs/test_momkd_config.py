"""The named configuration of MoMKD: presets, agreement with the method, recorded texts, switches."""

import os

import pytest

from configs import momkd
from configs.ablations import momkd as ablations
from histokd_jax.methods import registry
from histokd_jax.methods.momkd import config as method_config
from histokd_jax.train.run import control_config
from histokd_jax.utils import config

NAMED = {"momkd": "", "momkd_faithful": "faithful", "momkd_paper": "paper_hparams", "momkd_smoke": "er,smoke"}
WORDS = (*NAMED.values(), "fixed_memory", "ema_memory", "baseline", "slide_only", "pr,faithful,fold=2", "smoke,seed=3")


@pytest.mark.parametrize("name", NAMED)
def test_resolved_text_is_as_recorded(name, golden_dir):
    """Rewrite after an intended change with UPDATE_GOLDEN=1, and read the difference before committing it."""
    text = config.to_json(config.load(f"configs/momkd.py:{NAMED[name]}")) + "\n"
    path = golden_dir / "configs" / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} differs; UPDATE_GOLDEN=1 rewrites it"


@pytest.mark.parametrize("arg", WORDS)
def test_the_method_accepts_every_preset(arg):
    registry.method_module("momkd").validate(config.load(f"configs/momkd.py:{arg}"))


def test_defaults_equal_those_of_the_method():
    ours, theirs = config.flatten(config.load("configs/momkd.py")), config.flatten(method_config.default_config())
    assert set(theirs) <= set(ours), "the method reads keys that the named configuration lacks"
    assert {key: ours[key] for key in theirs} == theirs


def test_presets_equal_those_of_the_method():
    assert dict(momkd.METHOD_FAITHFUL) == dict(method_config.FAITHFUL)
    assert dict(momkd.PAPER_HPARAMS) == dict(method_config.PAPER_HPARAMS)


def test_every_switch_of_the_specification_has_its_key():
    flat = config.flatten(config.load("configs/momkd.py"))
    keys = (
        "graph.direction genes.ranking_scope labels.missing memory.update_by memory.momentum memory.renormalise "
        "memory.weight_decay memory.kmeans_pool attention.grad_to_memory attention.learn_temperature train.clip_norm "
        "train.b early_stop.patience early_stop.min_epoch eval.edgeless ablate.baseline_pool commit.move_codes "
        "loss.alpha_wsi loss.alpha_gene loss.lambda_rec model.codes"
    )
    assert set(keys.split()) <= set(flat)
    paper = config.flatten(config.load("configs/momkd.py:paper_hparams"))
    expected = {"model.d": 256, "model.sphere": 128, "loss.lambda_rec": 0.01, "memory.kmeans_pool": 10_000}
    assert {key: paper[key] for key in expected} == expected and not paper["attention.learn_temperature"]


def test_the_control_arm_trains_without_genes_and_a_run_without_genes_has_none():
    control = config.flatten(control_config(config.load("configs/momkd.py")))
    assert control["loss.alpha_gene"] == control["loss.lambda_rec"] == 0
    assert (control["loss.alpha_wsi"], control["loss.mem"]) == (0.2, 0.1)
    assert control_config(config.load("configs/momkd.py:slide_only")) is None


def test_words_and_settings_are_read():
    cfg = momkd.get_config("PR, fold=3,seed=7,ema_memory")
    assert (cfg.task, cfg.fold, cfg.seed, cfg.memory.update_by) == ("PR", "3", 7, "ema")
    assert momkd.get_config("task=ODX").task == "ODX"
    with pytest.raises(ValueError, match="exclude each other"):
        momkd.get_config("fixed_memory,ema_memory")
    with pytest.raises(ValueError, match="er, pr, her2, faithful"):
        momkd.get_config("odx")


def test_ablations_are_settings_that_the_method_accepts():
    settings, reference = config.load_sweep("configs/ablations/momkd.py:her2,all")
    assert reference == "full" and len(settings) == 1 + sum(map(len, ablations.FAMILIES.values()))
    for cfg in settings.values():
        registry.method_module("momkd").validate(cfg)
        assert cfg.task == "HER2"
    assert set(ablations.get_sweep()[1]) == {"full", *ablations.FAMILIES["terms"], *ablations.FAMILIES["memory"]}
