"""Using trained models on a data set: predictions of one mode, and attention of each patch."""

from __future__ import annotations

import csv
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from data_pipelines import schema
from data_pipelines.atomic import storage_errors
from data_pipelines.cohort import Cohort
from data_pipelines.manifest import Manifest
from data_pipelines.pipeline import make_eval_dataset
from histokd_jax.tasks import Table, get_task
from histokd_jax.train import data_kinds, evaluate, model_dir, pair_attention, sharding
from histokd_jax.train.new_bags import make_source, open_cohort
from histokd_jax.types import Batch, Method
from histokd_jax.utils import config as config_utils


def model_folders(path: pathlib.Path) -> list[pathlib.Path]:
    """The model folders of a run directory (all its folds), of a fold, or `path` itself.

    Raises:
      ValueError: if there is none.
    """
    for pattern in (model_dir.MODEL_FILE, f"model/{model_dir.MODEL_FILE}", f"fold_*/model/{model_dir.MODEL_FILE}"):
        found = sorted(path.glob(pattern))
        if found:
            return [file.parent for file in found]
    raise ValueError(f"{path} holds no trained model: give RUN, RUN/fold_0 or RUN/fold_0/model")


def default_mode(folder: pathlib.Path) -> str:
    """The mode that the model's configuration deploys (infer.mode)."""
    return json.loads((folder / model_dir.MODEL_FILE).read_text())["config"]["infer"]["mode"]


def write_table(folder: pathlib.Path, path: pathlib.Path, table: Table) -> None:
    """Writes predictions of a model in the schema of its task."""
    facts = json.loads((folder / model_dir.MODEL_FILE).read_text())
    get_task(config_utils.from_json(json.dumps(facts["config"]))).write_table(path, table)


def predict(folders: Sequence[pathlib.Path], data: pathlib.Path, mode: str, **tables: str) -> Table:
    """Predictions of every model on every slide of a data set (the fold column tells the models apart).

    Args:
      folders: model folders.
      data: data set directory; genes are read only if the mode needs them.
      mode: inference mode.
      **tables: labels, genes, cnv, task as in `new_bags.open_cohort`; of image pairs `labelled`.

    Returns:
      One row per slide (or image) and model.
    """
    parts = []
    for folder in folders:
        model = model_dir.load(folder, mode)
        new = data_kinds.new_data(model.cfg).open_new(model, mode, data, **tables)
        if new.cohort.dropped:
            logging.warning("%s", _drop_text(new.cohort))
        run = model.of_batches(functools.partial(_predict, model.method, mode))

        def step(batch, number, run=run):
            del number
            return {mode: run(batch)}

        def bar(batches: Iterable, name=folder.parent.name) -> Iterable:
            return tqdm(batches, desc=f"{mode}, {name}", unit="step", disable=None)

        task, rows, targets = model.task, new.source.table.slide_index, model.task.targets(new.cohort)
        found = evaluate.predict_source(step, new.source, new.feeder, task.outputs, progress=bar)
        parts.append(evaluate.as_table(task, found, rows, new.cohort, targets, model.facts["fold"]))
    return task.concatenate(parts)


def _predict(method: Method, mode: str, params: Any, extra: Any, batch: Batch) -> dict[str, Any]:
    return method.predict(params, {}, extra, batch, mode)


def _drop_text(cohort: Cohort) -> str:
    report = cohort.report()["dropped"]
    return "left out: " + ", ".join(f"{v['n']} ({reason}: {', '.join(v['ids'][:3])})" for reason, v in report.items())


def export_attention(folder: pathlib.Path, data: pathlib.Path, mode: str, out: pathlib.Path) -> list[pathlib.Path]:
    """Writes one CSV per slide: x, y (level-0 pixels, -1 if the data set has no coordinates) and attention.

    Of models that read whole images: one CSV per image, with row and column of the token.

    Args:
      folder: a model folder.
      data: data set directory.
      mode: an inference mode that reads patches.
      out: folder of the CSV files.

    Returns:
      The files, in manifest order.
    """
    model = model_dir.load(folder, mode)
    if data_kinds.kind_of(model.cfg) != data_kinds.BAGS:
        return pair_attention.write_tables(pair_attention.attend(folder, data, mode), out)
    reader, cohort, genes = open_cohort(data, model, mode)
    source = make_source(reader, cohort, genes, model, mode, with_coords=True)
    mesh = sharding.make_mesh(1)
    run = model.of_batches(lambda params, extra, batch: model.method.attention(params, {}, extra, batch, mode))
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    files, slides = [], _slides_of(cohort, Manifest.load(data))
    for batch in tqdm(make_eval_dataset(source, num_threads=2), desc="attention", unit="step", disable=None):
        weights = np.asarray(run(sharding.put_batch(mesh, batch)))
        files += _write_step(batch, weights, slides, out)
    return sorted(files)


def _slides_of(cohort: Cohort, manifest: Manifest) -> dict[int, list[tuple[str, int]]]:
    """Bag -> (slide id, patches) of its slides, in the order in which they are read."""
    members = cohort.slides or [(row,) for row in cohort.slide_index]
    found = [[(manifest.slides[row].slide_id, manifest.slides[row].n_patches) for row in rows] for rows in members]
    return dict(zip(cohort.bag_index.tolist(), found))


def _write_step(
    batch: Mapping[str, np.ndarray],
    weights: np.ndarray,
    slides: Mapping[int, Sequence[tuple[str, int]]],
    out: pathlib.Path,
) -> list[pathlib.Path]:
    segments, coords = batch[schema.SEGMENT_IDS].reshape(-1), batch[schema.COORDS].reshape(-1, 2)
    weights = weights.reshape(-1)
    files = []
    for slot in np.flatnonzero(batch[schema.SLIDE_INDEX] >= 0):
        mine = np.flatnonzero(segments == slot + 1)
        for slide_id, size in slides[int(batch[schema.SLIDE_INDEX][slot])]:
            own, mine = mine[:size], mine[size:]
            path = out / f"{slide_id}.csv"
            with storage_errors(path), path.open("w", newline="") as stream:
                rows = csv.writer(stream)
                rows.writerow(("x", "y", "attention"))
                rows.writerows((int(coords[i, 0]), int(coords[i, 1]), float(weights[i])) for i in own)
            files.append(path)
    return files
