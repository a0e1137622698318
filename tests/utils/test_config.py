"""Loading configurations: files, overrides, types, clear refusals."""

import pathlib

import pytest

from histokd_jax.utils import config

MKD = "configs/mkd.py:er"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.b=8", "train.b", 8),
        ("train.lr=1e-3", "train.lr", 1e-3),
        ("loss.lambda_skd=0", "loss.lambda_skd", 0.0),
        ("compare.control=False", "compare.control", False),
        ("compare.control=false", "compare.control", False),
        ("data.dir=/data/a=b", "data.dir", "/data/a=b"),
        ("teachers=M", "teachers", ("M",)),
        ("teachers=M,G", "teachers", ("M", "G")),
        ("teachers=('G',)", "teachers", ("G",)),
        ("teachers=()", "teachers", ()),
        ("teachers=", "teachers", ()),
        ("genes.exclude=TP53,ESR1", "genes.exclude", ("TP53", "ESR1")),
        ("genes.clip=5", "genes.clip", 5.0),
        ("genes.clip=none", "genes.clip", None),
        ("data.max_patches_train=4096", "data.max_patches_train", 4096),
        ("fold=1", "fold", "1"),
        ("skd.scale=1", "skd.scale", "1"),
    ],
)
def test_override_takes_the_type_of_its_default(text, key, value):
    found = config.flatten(config.load(MKD, [text]))[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "train.b=many",
            "train.b=1.5",
            "train.lr=fast",
            "train.lr='fast'",
            "compare.control=2",
            "compare.control=maybe",
        ),
        *(
            "train.b=True",
            "genes.clip=hard",
            "data.max_patches_train=1.5",
            "train.b=None",
            "train.b=[8]",
            "train.lr={}",
        ),
    ],
)
def test_value_of_another_type_is_refused_with_the_key(text):
    with pytest.raises(config.ConfigError, match=text.partition("=")[0]):
        config.load(MKD, [text])


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("loss.lambda_sdk", "loss.lambda_skd"),
        ("train.batchsize", "train.batching"),
        ("genes.topk", "genes.top_k"),
        ("lambda_skd", "loss.lambda_skd"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_names(key, near):
    with pytest.raises(config.ConfigError, match=near):
        config.load(MKD, [f"{key}=1"])


def test_key_like_no_other_lists_all_keys():
    with pytest.raises(config.ConfigError, match=r"keys are: .*train\.lr"):
        config.load(MKD, ["zzzzzz=1"])


def test_a_group_is_no_key():
    with pytest.raises(config.ConfigError, match="unknown config key 'loss'"):
        config.load(MKD, ["loss=0"])


def test_override_without_value_is_refused():
    with pytest.raises(config.ConfigError, match=r"--config\.train\.lr=VALUE"):
        config.load(MKD, ["train.lr"])


def test_value_of_a_preset_can_be_taken_back_to_none():
    assert config.load("configs/mkd.py:teacher512").genes.clip == 5.0
    assert config.load("configs/mkd.py:teacher512", ["genes.clip=none"]).genes.clip is None


def test_later_overrides_win():
    assert config.load(MKD, ["train.b=8", "train.b=4"]).train.b == 4


def test_configuration_is_locked():
    with pytest.raises((AttributeError, KeyError)):
        config.load(MKD).train.batchsize = 3


def test_json_round_trip_keeps_values_types_and_fingerprint():
    cfg = config.load(MKD, ["genes.exclude=TP53", "genes.clip=5"])
    back = config.from_json(config.to_json(cfg))
    assert config.flatten(back) == config.flatten(cfg)
    assert config.fingerprint(back) == config.fingerprint(cfg)
    assert config.fingerprint(config.load(MKD)) != config.fingerprint(cfg)


def test_missing_file_lists_the_shipped_ones():
    with pytest.raises(config.ConfigError, match="'configs/mkdd.py' not found.*mkd.py"):
        config.load("configs/mkdd.py")


@pytest.mark.parametrize("name", ["mkd.py", "configs/mkd.py"])
def test_named_configuration_resolves_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.load(f"{name}:pr").task == "PR"


def test_own_file_may_stand_anywhere_and_use_the_shared_settings(tmp_path):
    shipped = pathlib.Path(__file__).parents[2] / "configs" / "mkd.py"
    own = tmp_path / "mkd.py"
    own.write_text(shipped.read_text().replace("d=256", "d=32"))
    assert config.load(str(own)).model.d == 32
    assert config.load("configs/mkd.py").model.d == 256


def test_two_own_files_of_one_name_are_told_apart(tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        text = (
            f"from ml_collections import ConfigDict\ndef get_config(arg=''):\n  return ConfigDict(dict(n={number}))\n"
        )
        (tmp_path / str(number) / "own.py").write_text(text)
    assert [config.load(str(tmp_path / n / "own.py")).n for n in ("1", "2")] == [1, 2]


def test_file_without_get_config_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("X = 1\n")
    with pytest.raises(config.ConfigError, match="get_config"):
        config.load(str(tmp_path / "empty.py"))
