"""What a newcomer meets first: help, version, usage errors."""

import subprocess
import sys

import pytest

from histokd_jax import __version__
from histokd_jax.cli.main import COMMANDS, main

WORDS = {
    "demo": ("simulated cohort", "--workdir", "--smoke", "default: runs/demo"),
    "simulate": ("--out", "--set", "FIELD=VALUE", "--labels", "real genes and labels, simulated bags"),
    "tile": ("OpenSlide", "--target-mpp", "--mpp", "in TRIDENT's layout", "quarantine.csv", "for QuPath", "Exit code"),
    "embed": ("--coords", "--random-weights", "nothing is downloaded", "--stain", "quarantine.csv", "Exit code"),
    "import": ("CLAM, TRIDENT, STAMP", "--case-regex", "--format", "quarantine.csv", "--level0-mpp", "Exit code"),
    "tables": ("MCAT, PORPOISE", "--study", "--endpoint", "--outliers", "availability.csv", "never a row of zeros"),
    "pairs": ("H&E tile and its partner", "--partner-folder", "--label-regex", "--resize", "in quarantine"),
    "validate": ("--tables", "--splits", "--json", "--accept", "a training would be wrong"),
    "splits": ("--site-preserved", "--survival", "--task", "all slides of a patient together"),
    "train": ("--config", "--workdir", "--config.KEY=VALUE", "continues an interrupted run", "--coordinator"),
    "sweep": ("--seeds", "--only", "--dry-run", "continues an interrupted sweep", "diverges is stopped alone", "table"),
    "evaluate": ("summary.json", "--data", "--labels", "External test"),
    "predict": ("no genes and no teacher parameters are needed", "--model", "--attention", "--out"),
    "probe": ("labels.csv", "--encoder", "--fractions", "leakage cannot be excluded", "--maps", "Exit code"),
    "convert": ("--to-torch", "--config", "no code in a file is run", "errors that name the key"),
    "report": ("report.html", "RUN"),
}


def test_every_command_has_help_that_is_checked():
    assert set(WORDS) == set(COMMANDS)
    assert {"demo", "simulate", "import", "train", "sweep", "evaluate", "predict", "convert", "report"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_says_what_it_does_and_how(histokd, command):
    shown = histokd(command, "--help")
    assert shown.code == 0
    text = " ".join(shown.out.split())
    for word in WORDS[command]:
        assert word in text, word


@pytest.mark.parametrize("command", ["simulate", "train", "sweep", "evaluate", "predict"])
def test_help_shows_a_command_to_copy(histokd, command):
    assert f"  histokd {command} --" in histokd(command, "--help").out


def test_top_level_help_lists_every_command_and_a_first_session(histokd):
    shown = histokd("--help")
    assert shown.code == 0
    for name, module in COMMANDS.items():
        assert name in shown.out and module.HELP in " ".join(shown.out.split())
    assert "A first session" in shown.out and "histokd demo" in shown.out


def test_no_line_of_help_is_wider_than_a_terminal_window(histokd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for command in COMMANDS:
        assert max(map(len, histokd(command, "--help").out.splitlines())) <= 122, command


def test_version(histokd):
    assert histokd("--version").out.strip() == f"histokd {__version__}"


@pytest.mark.parametrize("arguments", [("trian",), (), ("train",), ("report",), ("predict", "--model", "m")])
def test_usage_errors_exit_with_2_and_name_what_is_missing(histokd, arguments):
    shown = histokd(*arguments)
    assert shown.code == 2
    assert "usage: histokd" in shown.err and ("invalid choice" in shown.err or "required" in shown.err)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("report", "run", "--bogus"), "--bogus"),
        (("train", "--config", "configs/mkd.py", "--lr=3"), "--lr=3"),
        (("report", "run", "--config.train.lr=1"), "--config.train.lr=1"),
    ],
)
def test_unknown_argument_is_named(histokd, arguments, named):
    shown = histokd(*arguments)
    assert shown.code == 2 and "unknown arguments" in shown.err and named in shown.err


def test_module_can_be_started_without_the_script():
    done = subprocess.run(
        [sys.executable, "-m", "histokd_jax.cli.main", "--version"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.startswith("histokd ")


@pytest.mark.parametrize(("stop", "code"), [("Interrupted", 130), ("KeyboardInterrupt", 130), ("DivergedError", 1)])
def test_exit_codes_of_interruptions_and_failures(monkeypatch, capsys, tmp_path, stop, code):
    from histokd_jax.train.loop import DivergedError
    from histokd_jax.train.signals import Interrupted

    error = {"Interrupted": Interrupted, "KeyboardInterrupt": KeyboardInterrupt, "DivergedError": DivergedError}[stop]

    def fail(args):
        raise error("loss became NaN")

    monkeypatch.setattr(COMMANDS["report"], "run", fail)
    assert main(["report", str(tmp_path)]) == code
    assert capsys.readouterr().err.startswith("histokd")
