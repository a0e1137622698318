"""Reads what the report needs from a run directory.

Layout (`control/` repeats it for the same student trained with every lambda at 0):

  config.json            resolved config
  run_manifest.json      {"simulated": bool, "dataset", "method", "task", "class_names", "patient_overlap": bool,
                          "cohort": {...}, "versions": {...}, "seed", "data_fingerprint", "split_fingerprint",
                          "command", ...}; only `simulated` is required, everything else is shown if present
  summary.json           evals.summary.summarise of the test predictions
  predictions_test.csv   evals.predictions schema; predictions_val.csv likewise (optional)
  fold_*/follow_up_train.csv, time_bins.json   what the metrics of a survival task need of the training part
  fold_*/metrics.jsonl   {"step", "epoch", "split": "train" | "val", "stage", metric: value, ...}
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipelines.follow_up import read_survival
from histokd_jax.evals.predictions import Predictions, read_predictions
from histokd_jax.evals.representation_predictions import RepresentationRows, read_rows
from histokd_jax.evals.summary import SIMULATED as SIMULATED_DATA
from histokd_jax.evals.survival_measures import Reference
from histokd_jax.evals.survival_predictions import SurvivalPredictions, read_survival_predictions

SIMULATED, SIMULATED_IMAGES = SIMULATED_DATA["bags"], SIMULATED_DATA["pairs"]
OVERLAP = "within one patient, across sections"
CLASSIFICATION, SURVIVAL, REPRESENTATION = "classification", "survival", "representation"
READERS = {
    CLASSIFICATION: read_predictions,
    SURVIVAL: read_survival_predictions,
    REPRESENTATION: read_rows,
}
"""`task_kind` of run_manifest.json (absent: classification) -> reader of its prediction tables."""


class RunDirError(ValueError):
    """A run directory that cannot be reported; names the file and what is wrong."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      directory: where it lies.
      config: resolved config.
      manifest: run_manifest.json.
      summary: summary.json.
      test: test predictions.
      val: validation predictions, or None.
      curves: fold number -> records of metrics.jsonl.
      control: the same student with every lambda at 0, or None.
    """

    directory: pathlib.Path
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    summary: Mapping[str, Any]
    test: Predictions | SurvivalPredictions | RepresentationRows
    val: Predictions | SurvivalPredictions | RepresentationRows | None
    curves: Mapping[int, list[dict[str, Any]]]
    control: Run | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """What every title, table and figure must say about the data."""
        overlap = (OVERLAP,) if self.manifest.get("patient_overlap") else ()
        protocol = tuple(self.manifest.get("marks", ()))
        simulated = (SIMULATED_DATA[self.manifest.get("data_kind", "bags")],) if self.manifest["simulated"] else ()
        return simulated + overlap + protocol

    @property
    def kind(self) -> str:
        """The kind of task."""
        return self.manifest.get("task_kind", CLASSIFICATION)

    @property
    def headline_mode(self) -> str:
        """The mode that is deployed: "pathology" if there is one."""
        return "pathology" if "pathology" in self.test.modes else self.test.modes[0]


def load_run(directory: pathlib.Path, *, with_control: bool = True) -> Run:
    """Read a run directory and its control, if there is one.

    Args:
      directory: run directory.
      with_control: also read DIRECTORY/control.

    Returns:
      The run.

    Raises:
      RunDirError: on a missing or unreadable file, a manifest that does not state `simulated`, a summary of other
        folds than the predictions, or a control that is none (a lambda above 0, another split or data set).
    """
    directory = pathlib.Path(directory)
    manifest = _read_json(directory / "run_manifest.json")
    if not isinstance(manifest.get("simulated"), bool):
        raise RunDirError(f"{directory / 'run_manifest.json'}: `simulated` must be true or false, the report states it")
    kind = manifest.get("task_kind", CLASSIFICATION)
    if kind not in READERS:
        raise RunDirError(f"{directory / 'run_manifest.json'}: task_kind is {kind!r}, expected one of {list(READERS)}")
    read, val = READERS[kind], directory / "predictions_val.csv"
    run = Run(
        directory=directory,
        config=_read_json(directory / "config.json"),
        manifest=manifest,
        summary=_read_json(directory / "summary.json"),
        test=read(_existing(directory / "predictions_test.csv")),
        val=read(val) if val.exists() else None,
        curves={_fold_number(path): _read_jsonl(path) for path in sorted(directory.glob("fold_*/metrics.jsonl"))},
    )
    _check_summary(run)
    if with_control and (directory / "control").is_dir():
        control = load_run(directory / "control", with_control=False)
        _check_control(run, control)
        return dataclasses.replace(run, control=control)
    return run


def read_references(run: Run) -> dict[int, Reference]:
    """Fold -> follow-up and time bins of the training part of a survival run.

    Raises:
      RunDirError: a fold lacks them.
    """
    found = {}
    for k in run.test.folds:
        folder = run.directory / f"fold_{k}"
        follow_up = read_survival(_existing(folder / "follow_up_train.csv")).survival
        found[k] = Reference(*follow_up, tuple(_read_json(folder / "time_bins.json")["edges"]))
    return found


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings as ("a.b", value); lists of mappings get an index, other lists stay leaves."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        for i, item in enumerate(tree):
            yield from flatten(item, f"{prefix}.{i}")
    else:
        yield prefix, tree


def lambdas(config: Mapping[str, Any]) -> dict[str, float]:
    """All loss weights `...lambda_*` of a config, by dotted name."""
    return {key: value for key, value in flatten(config) if key.split(".")[-1].startswith("lambda_")}


def _existing(path: pathlib.Path) -> pathlib.Path:
    if not path.is_file():
        raise RunDirError(f"{path} is missing: not a finished run directory (run `histokd evaluate` first?)")
    return path


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(_existing(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunDirError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunDirError(f"{path}: a JSON object is expected, found {type(value).__name__}")
    return value


def _read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
    records = []
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            # A killed run may leave its last line half written; anything earlier is damage.
            if number == len(lines) and not text.endswith("\n"):
                break
            raise RunDirError(f"{path}: line {number} is not JSON: {error}") from error
    return records


def _fold_number(path: pathlib.Path) -> int:
    name = path.parent.name.removeprefix("fold_")
    if not name.isdecimal():
        raise RunDirError(f"{path.parent}: a directory fold_<number> is expected")
    return int(name)


def _check_summary(run: Run) -> None:
    path = run.directory / "summary.json"
    if "modes" not in run.summary or "folds" not in run.summary:
        raise RunDirError(f"{path}: `modes` and `folds` are expected, found {sorted(run.summary)}")
    found = (list(run.summary["folds"]), sorted(run.summary["modes"]))
    expected = (list(run.test.folds), sorted(run.test.modes))
    if found != expected:
        raise RunDirError(f"{path} summarises folds and modes {found}, predictions_test.csv holds {expected}: stale?")


def _check_control(run: Run, control: Run) -> None:
    nonzero = {key: value for key, value in lambdas(control.config).items() if value != 0}
    if nonzero:
        raise RunDirError(
            f"{control.directory / 'config.json'}: the control must have every lambda at 0, has {nonzero}"
        )
    for key in ("simulated", "data_fingerprint", "split_fingerprint"):
        ours, theirs = run.manifest.get(key), control.manifest.get(key)
        if ours != theirs:
            raise RunDirError(
                f"{control.directory}: {key} is {theirs!r}, the distilled run has {ours!r}: no fair control"
            )
