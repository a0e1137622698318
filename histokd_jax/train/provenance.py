"""What is written beside every result so that each number can be traced: versions, seeds, fingerprints, flags."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from histokd_jax import __version__
from histokd_jax.train import data_kinds
from histokd_jax.train.experiment import Experiment, FoldData
from histokd_jax.utils import config as config_utils

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array_record", "numpy", "ml-collections")


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that shape the numbers."""
    found = {"histokd_jax": __version__, "python": platform.python_version()}
    return {**found, **{name: importlib.metadata.version(name) for name in PACKAGES}}


def git_revision() -> str | None:
    """Commit of the source tree this code runs from, with "+" if it has local changes; None when installed."""
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def host_facts(cfg: ConfigDict) -> dict[str, Any]:
    """What must be equal on all processes of a run before any of them reads data.

    Args:
      cfg: resolved configuration.
    """
    facts = {f"config {key}": value for key, value in config_utils.flatten(cfg).items()}
    facts |= {f"version of {name}": version for name, version in versions().items()}
    facts["git revision"] = git_revision()
    if cfg.data.dir:
        facts["data set"] = data_kinds.training(cfg).open_manifest(cfg.data.dir).fingerprint()
    return facts


def run_manifest(experiment: Experiment, folds: Mapping[int, FoldData], command: Sequence[str]) -> dict[str, Any]:
    """The facts of a run (run_manifest.json).

    Args:
      experiment: data set, cohort and splits.
      folds: the planned folds by number.
      command: the command line, without the path of the program.

    Returns:
      JSON-able facts.
    """
    manifest, cohort, kind = experiment.manifest, experiment.cohort, data_kinds.kind_of(experiment.cfg)
    splits = {str(k): data.split_hash for k, data in folds.items()}
    task = experiment.task.run_facts(experiment.cfg, cohort, experiment.folds)
    marks = [*experiment.marks, *dict.fromkeys(mark for data in folds.values() for mark in data.marks)]
    return {
        **task,
        **({"marks": marks} if marks else {}),
        "method": experiment.cfg.method,
        "task": experiment.cfg.task,
        "class_names": list(cohort.class_names),
        "dataset": manifest.name,
        **({"data_kind": kind} if kind != data_kinds.BAGS else {}),
        "simulated": manifest.simulated,
        "simulation": manifest.simulation,
        "patient_overlap": any(split.patient_overlap for split in experiment.folds),
        "encoder": manifest.encoder,
        "cohort": cohort.report(),
        "unassigned_by_splits": {str(k): list(s.unassigned) for k, s in enumerate(experiment.folds) if s.unassigned},
        "split_ids_not_in_cohort": {
            str(k): list(s.not_in_cohort) for k, s in enumerate(experiment.folds) if s.not_in_cohort
        },
        "packing": {str(k): data.train.plan.report() for k, data in folds.items()},
        "genes": {
            str(k): {field: dict(selection.source) for field, selection in data.selections.items()}
            for k, data in folds.items()
        },
        "seed": experiment.cfg.seed,
        "split_seed": experiment.cfg.split.seed,
        "data_fingerprint": manifest.fingerprint(),
        "split_fingerprint": hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest(),
        "split_hashes": splits,
        "config_fingerprint": config_utils.fingerprint(experiment.cfg),
        "versions": versions(),
        "processes": jax.process_count(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "git": git_revision(),
        "command": " ".join(command),
    }
