"""Bags that a trained model is applied to."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from data_pipelines import packing, schema
from data_pipelines.assembler import Reader
from data_pipelines.cohort import ALL_SLIDES, Cohort
from data_pipelines.genes import GeneTable
from data_pipelines.manifest import Manifest
from data_pipelines.pipeline import SlideTable, StepSource
from data_pipelines.reader import BagReader
from histokd_jax.tasks import Tables
from histokd_jax.train import cluster_choice, gene_choice, sharding
from histokd_jax.train.experiment import check_width, neighbours_of
from histokd_jax.train.feed import StreamFeeder
from histokd_jax.train.model_dir import Model
from histokd_jax.train.new_data import NewData


def open_new(model: Model, mode: str, data: pathlib.Path, **tables: str) -> NewData:
    """The input of a model.

    Args:
      model: the model.
      mode: inference mode.
      data: data set directory; genes are read only if the mode needs them.
      **tables: labels, genes, cnv, task as in `open_cohort`.

    Raises:
      ValueError: as `open_cohort`.
    """
    reader, cohort, genes = open_cohort(data, model, mode, **tables)
    source = make_source(reader, cohort, genes, model, mode)
    return NewData(source, cohort, StreamFeeder(sharding.make_mesh(1), threads=2), reader.manifest)


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


def make_source(
    reader: Reader, cohort: Cohort, tables: Mapping[str, GeneTable], model: Model, mode: str, with_coords: bool = False
) -> StepSource:
    """One exact pass over all bags, with the genes that the model reads; `with_coords` adds the coordinates."""
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
    options = {"with_coords": with_coords, "clusters": ids, "neighbours": neighbours_of(model.cfg, wanted)}
    return StepSource(reader, table, plan, dtype=reader.manifest.dtype, **options)
