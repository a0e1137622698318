"""A sweep on data whose trainings are not stacked into one program: every setting and seed is a run of its own."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from absl import logging
from ml_collections import ConfigDict

from histokd_jax.train import run
from histokd_jax.train.loop import DivergedError
from histokd_jax.train.resident import CohortCache
from histokd_jax.train.signals import StopRequest


def train_settings(
    experiments: dict[tuple[str, int], object],
    configure: Callable[[ConfigDict, int], ConfigDict],
    directory: Callable[[str, int], pathlib.Path],
    folds: Sequence[int],
    command: Sequence[str],
    stop: StopRequest,
) -> dict[str, str]:
    """Trains settings and seeds one after the other; those that are finished are not trained again.

    Args:
      experiments: (setting, seed) -> its experiment.
      configure: (configuration, seed) -> the configuration of that seed.
      directory: (setting, seed) -> run directory.
      folds: fold numbers.
      command: the command line.
      stop: request to stop.

    Returns:
      Name of each training that diverged -> why; the others go on.

    Raises:
      Interrupted: a signal arrived; a checkpoint was written.
      CheckpointMismatchError: a directory holds another run.
    """
    failed, current, built = {}, None, None
    for (name, seed), experiment in experiments.items():
        own = dataclasses.replace(experiment, cfg=configure(experiment.cfg, seed))
        title = f"{name}, seed {seed}"
        if name != current:
            # Seeds of a setting follow each other and share its programs.
            current, built = name, run.build(own, folds)
        try:
            run.train_arm(own, folds, directory(name, seed), command, stop, title, CohortCache(), built)
        except DivergedError as error:
            failed[title] = str(error)
            logging.warning("%s diverged and is given up: %s", title, error)
    return failed
