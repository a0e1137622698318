"""Using trained models on a data set: predictions of one mode, and attention of each patch."""

from __future__ import annotations

import csv
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from data_pipelines import packing, schema
from data_pipelines.assembler import Reader
from data_pipelines.atomic import storage_errors
from data_pipelines.cohort import ALL_SLIDES, Cohort
from data_pipelines.genes import GeneTable
from data_pipelines.manifest import Manifest
from data_pipelines.pipeline import SlideTable, StepSource, make_eval_dataset
from data_pipelines.reader import BagReader
from histokd_jax.tasks import Table, Tables, get_task
from histokd_jax.train import cluster_choice, evaluate, gene_choice, model_dir, sharding
from histokd_jax.train.experiment import check_width
from histokd_jax.train.feed import StreamFeeder
from histokd_jax.train.model_dir import Model
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


def open_cohort(
    data: pathlib.Path, model: Model, mode: str, *, labels: str = "", genes: str = "", cnv: str = "", task: str = ""
) -> tuple[Reader, Cohort, dict[str, GeneTable]]:
    """Joins a data set with only the tables that a mode needs.

    Args:
      data: data set directory.
      model: the model that will read it.
      mode: inference mode.
      labels: table of the answers (class labels, or follow-up of a survival task); empty: none, all unknown.
      genes: gene table; empty: tables/genes.npz of the data set. Read only if the mode needs genes.
      cnv: copy-number table, for modes of two-stream variants that need it.
      task: label column; empty: the model's.

    Returns:
      Reader of the samples' bags, cohort, and the gene tables by batch field.

    Raises:
      ValueError: another patch width, missing genes or tables that do not join.
    """
    manifest = Manifest.load(data)
    check_width(manifest, model.spec.feat_dim)
    genes_path = None
    if schema.GENES in model.method.mode(mode).fields:
        genes_path = pathlib.Path(genes) if genes else pathlib.Path(data) / "tables" / "genes.npz"
        if not genes_path.exists():
            raise ValueError(f"mode {mode!r} needs genes, but there is no {genes_path.name}: give --genes FILE")
    # Without tables every slide is predicted; tables keyed by case take the slides of a case as in training.
    by_case = labels or genes_path or model.cfg.data.slide_choice == ALL_SLIDES
    answers = {model.task.answers: pathlib.Path(labels)} if labels else {}
    cohort = model.task.open_cohort(
        manifest,
        model.cfg,
        Tables(genes=genes_path, **answers),
        task=(task or model.cfg.task) if labels else None,
        unit=model.cfg.data.unit if by_case else "slide",
        read_genes=lambda path: gene_choice.read_table(model.cfg, path),
    )
    if labels and list(cohort.class_names) != model.class_names:
        raise ValueError(f"{labels} has classes {list(cohort.class_names)}, the model {model.class_names}")
    tables = {} if cohort.genes is None else {schema.GENES: cohort.genes}
    if gene_choice.CNV in model.method.mode(mode).fields:
        tables[gene_choice.CNV] = gene_choice.read_copy_number(cnv, cohort)
    return cohort.open_bags(BagReader(manifest)), cohort, tables


def _source(
    reader: Reader, cohort: Cohort, tables: Mapping[str, GeneTable], model: Model, mode: str, with_coords: bool = False
) -> StepSource:
    fields: dict[str, Any] = {field: s.apply_table(tables[field]) for field, s in model.selections.items()}
    if fields:
        fields[schema.HAS_GENES] = cohort.has_genes
    plan = packing.plan_evaluation(
        reader.manifest.sizes[cohort.bag_index],
        target_capacity=16 * model.cfg.data.chunk,
        num_slots=model.cfg.eval.slots,
        multiple_of=model.cfg.data.row_multiple,
    )
    table = SlideTable(cohort.bag_index, fields)
    wanted = model.method.mode(mode).fields
    ids = cluster_choice.of_model(model.cfg, wanted, model.clusters, reader, cohort.bag_index)
    return StepSource(reader, table, plan, dtype=reader.manifest.dtype, with_coords=with_coords, clusters=ids)


def predict(folders: Sequence[pathlib.Path], data: pathlib.Path, mode: str, **tables: str) -> Table:
    """Predictions of every model on every slide of a data set (the fold column tells the models apart).

    Args:
      folders: model folders.
      data: data set directory; genes are read only if the mode needs them.
      mode: inference mode.
      **tables: labels, genes, cnv, task as in `open_cohort`.

    Returns:
      One row per slide and model.
    """
    feeder = StreamFeeder(sharding.make_mesh(1), threads=2)
    parts = []
    for folder in folders:
        model = model_dir.load(folder, mode)
        reader, cohort, genes = open_cohort(data, model, mode, **tables)
        if cohort.dropped:
            logging.warning("%s", _drop_text(cohort))
        run = jax.jit(lambda batch, model=model: model.method.predict(model.params, {}, model.extra, batch, mode))

        def step(batch, number, run=run):
            del number
            return {mode: run(batch)}

        def bar(batches: Iterable, name=folder.parent.name) -> Iterable:
            return tqdm(batches, desc=f"{mode}, {name}", unit="step", disable=None)

        source = _source(reader, cohort, genes, model, mode)
        task, bags = model.task, source.table.slide_index
        found = evaluate.predict_source(step, source, feeder, task.outputs, progress=bar)
        parts.append(evaluate.as_table(task, found, bags, cohort, task.targets(cohort), model.facts["fold"]))
    return task.concatenate(parts)


def _drop_text(cohort: Cohort) -> str:
    report = cohort.report()["dropped"]
    return "left out: " + ", ".join(f"{v['n']} ({reason}: {', '.join(v['ids'][:3])})" for reason, v in report.items())


def export_attention(folder: pathlib.Path, data: pathlib.Path, mode: str, out: pathlib.Path) -> list[pathlib.Path]:
    """Writes one CSV per slide: x, y (level-0 pixels, -1 if the data set has no coordinates) and attention.

    Args:
      folder: a model folder.
      data: data set directory.
      mode: an inference mode that reads patches.
      out: folder of the CSV files.

    Returns:
      The files, in manifest order.
    """
    model = model_dir.load(folder, mode)
    reader, cohort, genes = open_cohort(data, model, mode)
    source = _source(reader, cohort, genes, model, mode, with_coords=True)
    mesh = sharding.make_mesh(1)
    run = jax.jit(lambda batch: model.method.attention(model.params, {}, model.extra, batch, mode))
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
