"""Fixtures of the command line's tests: a tiny data set, a finished run, and the command called in this process."""

import dataclasses

import pytest
import tiny
from tiny import cohort_dir

from histokd_jax.cli.main import main

__all__ = ["cohort_dir"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def histokd(capsys):
    """Runs `histokd ARGUMENTS` and returns exit code and output; a refusal must be one line without a traceback."""

    def call(*arguments):
        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stopped:  # argparse: --help and usage errors
            code = stopped.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Outcome(code, out, err)

    return call


@pytest.fixture(scope="session")
def finished_run(cohort_dir, tmp_path_factory):
    """A run of two folds with control and report; read only."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert main(tiny.train_arguments(cohort_dir, workdir, fold="all", compare__control=True, seed=3)) == 0
    return workdir
