"""Every named configuration: its full text is recorded, it needs no JAX, and the method accepts it."""

import os
import pathlib
import subprocess
import sys

import pytest

from configs import common, mkd
from histokd_jax.methods import registry
from histokd_jax.methods.mkd import config as method_config
from histokd_jax.utils import config

ROOT = pathlib.Path(__file__).parents[2]
NAMED = {
    "mkd": "",
    "mkd_er": "er",
    "mkd_pr_fold2": "pr,fold=2",
    "mkd_her2": "her2",
    "mkd_faithful": "faithful",
    "mkd_teacher512": "teacher512",
    "mkd_gmkdn": "gmkdn",
    "mkd_demo": "demo",
    "mkd_smoke": "smoke",
}


@pytest.mark.parametrize("name", NAMED)
def test_resolved_text_is_as_recorded(name, golden_dir):
    """Rewrite after an intended change with UPDATE_GOLDEN=1, and read the difference before committing it."""
    text = config.to_json(config.load(f"configs/mkd.py:{NAMED[name]}")) + "\n"
    path = golden_dir / "configs" / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} differs; UPDATE_GOLDEN=1 rewrites it"


@pytest.mark.parametrize("arg", [*NAMED.values(), "er,faithful,teacher512", "pr,demo,seed=3", "gmkdn,faithful"])
def test_the_method_accepts_every_preset(arg):
    registry.method_module("mkd").validate(config.load(f"configs/mkd.py:{arg}"))


def test_defaults_equal_those_of_the_method():
    ours, theirs = config.flatten(config.load("configs/mkd.py")), config.flatten(method_config.default_config())
    assert set(theirs) <= set(ours), "the method reads keys that the named configuration lacks"
    assert {key: ours[key] for key in theirs} == theirs


def test_faithful_preset_equals_that_of_the_method():
    assert dict(mkd.FAITHFUL) == dict(method_config.FAITHFUL)


def test_values_without_default_are_not_tied_together():
    cfg = config.load("configs/mkd.py", ["genes.clip=5", "model.gene_dropout=0.5", "data.max_patches_train=100"])
    assert (cfg.genes.clip, cfg.model.gene_dropout, cfg.data.max_patches_train) == (5.0, 0.5, 100)
    only = config.load("configs/mkd.py", ["genes.clip=5"])
    assert only.model.gene_dropout is None and only.data.max_patches_train is None


def test_two_configurations_share_nothing():
    first, second = mkd.get_config("er"), mkd.get_config("er")
    first.genes.clip, first.loss.lambda_skd = 5.0, 0.0
    assert second.genes.clip is None and second.loss.lambda_skd == 1.0


def test_configs_need_neither_jax_nor_the_package():
    code = (
        "import sys; from configs import mkd; mkd.get_config('er,faithful,fold=all');"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'jax', 'histokd_jax', 'data_pipelines', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_words_and_settings_are_read():
    cfg = mkd.get_config("HER2, fold=3,seed=7")
    assert (cfg.task, cfg.fold, cfg.seed) == ("HER2", "3", 7)
    assert mkd.get_config("task=PAM50").task == "PAM50"


@pytest.mark.parametrize("arg", ["eer", "fold=first", "folds=2", "seed=", "fold"])
def test_bad_argument_is_named_with_what_is_allowed(arg):
    with pytest.raises(config.ConfigError, match=r"configs/mkd\.py"):
        config.load(f"configs/mkd.py:{arg}")
    with pytest.raises(ValueError, match="er, pr, her2, faithful|fold"):
        mkd.get_config("eer" if arg == "seed=" else arg)


def test_parse_arg_skips_blanks():
    assert common.parse_arg(" smoke ,, n=2", ("smoke",), {"n": int}) == {"smoke": True, "n": 2}
