"""Images that a trained model is applied to: with partners only if the mode reads them."""

from __future__ import annotations

import pathlib

import numpy as np

from data_pipelines import schema
from data_pipelines.pairs.cohort import pair_cohort
from data_pipelines.pairs.folder import open_reader
from data_pipelines.pairs.manifest import PairManifest
from data_pipelines.pairs.steps import NO_PARTNER, VECTOR, plan_evaluation
from histokd_jax.train import sharding
from histokd_jax.train.model_dir import Model
from histokd_jax.train.new_data import NewData
from histokd_jax.train.pair_experiment import make_source, partner_of
from histokd_jax.train.pair_feed import PairFeeder
from histokd_jax.types import REPRESENTATION


def open_new(
    model: Model, mode: str, data: pathlib.Path, *, labels: str = "", genes: str = "", cnv: str = "", task: str = ""
) -> NewData:
    """The input of a model.

    Args:
      model: the model.
      mode: inference mode.
      data: a data set of image pairs (partners may be absent), or a folder of images.
      labels: not empty: predict the labelled images only, to compare with their labels, which are in the data set; an
        existing file is refused. Without meaning for a task that has no labels.
      genes, cnv: of bags only; must be empty.
      task: name of the label; empty: the model's.

    Raises:
      ValueError: images of another size than the model was trained on, missing partners, other classes.
    """
    if genes or cnv:
        raise ValueError("--genes and --cnv are tables of slides; image pairs have none")
    if labels and pathlib.Path(labels).is_file():
        raise ValueError(f"{labels}: the labels of image pairs are in their data set: use `histokd pairs --labels`")
    reader = open_reader(pathlib.Path(data))
    labelled = bool(labels) and model.task.kind != REPRESENTATION
    check_input(reader.manifest, model, labelled)
    cohort = pair_cohort(reader.manifest, task or model.cfg.task, labelled=labelled)
    wanted = schema.PARTNER in model.method.mode(mode).fields
    partner = partner_of(model.cfg, reader.manifest) if wanted else NO_PARTNER
    if wanted and partner == NO_PARTNER:
        raise ValueError(f"mode {mode!r} reads the partner of every image, data set {reader.manifest.name} has none")
    if partner == VECTOR and reader.manifest.vector_size != model.spec.vector_size:
        raise ValueError(
            f"data set {reader.manifest.name} has vectors of {reader.manifest.vector_size} numbers, the model was "
            f"trained on {model.spec.vector_size}: write it again with `histokd pairs --vectors` of the same columns"
        )
    plan = plan_evaluation(len(cohort), model.cfg.train.b)
    source = make_source(reader, cohort, np.arange(len(cohort)), partner, plan)
    return NewData(source, cohort, PairFeeder(sharding.make_mesh(1), model.cfg.data.threads), reader.manifest)


def check_input(manifest: PairManifest, model: Model, labelled: bool) -> None:
    """Refuses images that the model was not made for.

    Raises:
      ValueError: another size; or, if labels are compared, other classes.
    """
    if manifest.image_size != model.spec.image_size:
        there, here = ("x".join(map(str, size)) for size in (manifest.image_size, model.spec.image_size))
        raise ValueError(
            f"data set {manifest.name} has images of {there} pixels, the model was trained on {here}: write it again "
            f"with `histokd pairs --resize {here}`"
        )
    if labelled and list(manifest.class_names) != model.class_names:
        raise ValueError(
            f"data set {manifest.name} has classes {list(manifest.class_names)}, the model {model.class_names}: write "
            f"it again with `histokd pairs --classes {','.join(model.class_names)}`"
        )
