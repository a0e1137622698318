"""Survival from molecular features alone: cohorts, recipes, and one program that trains every seed and fold.

No patches are read, so nothing of the shared trainer's input is needed; networks, losses, samplers, windows and metrics
are the library's own.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from data_pipelines import sampling, splits
from data_pipelines.cohort import Cohort
from data_pipelines.errors import DataError
from data_pipelines.follow_up import read_survival
from data_pipelines.gene_groups import read_molecular_table
from data_pipelines.genes import GeneTable
from data_pipelines.survival import check_folds, fit_time_bins, sampling_class
from data_pipelines.tabular import NEVER_FEATURES, select_columns
from data_pipelines.windows import CARRY, DROP, accumulation_windows
from histokd_jax.losses.survival import risk_score
from histokd_jax.methods.supervised.objective import COX, PER_BAG, ObjectiveSpec, bag_loss
from histokd_jax.nn.snn import SnnNet
from histokd_jax.train.schedules import learning_rate

TABLES = {"mcat": "datasets_csv_sig", "porpoise": "datasets_csv_mutsig"}
ADAMW, ADAM_L2, CONSTANT = "adamw", "adam_l2", "constant"
BALANCED, UNIFORM = sampling.SAMPLERS


@dataclasses.dataclass(frozen=True, eq=False)
class GeneCohort:
    """n patients of one table with the official folds.

    Attributes:
      table: molecular columns, one row per patient.
      time: [n] float64 months.
      event: [n] bool, True = death observed.
      folds: training and reported rows of every fold; the reported parts partition the patients.
    """

    table: GeneTable
    time: np.ndarray
    event: np.ndarray
    folds: tuple[splits.Split, ...]

    @property
    def fold(self) -> np.ndarray:
        """[n] int, the fold in which a patient is reported."""
        out = np.full(len(self.time), -1)
        for k, split in enumerate(self.folds):
            out[split.test] = k
        return out


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network on molecular features is trained.

    Attributes:
      metadata: "by_name", or "positional": the off-by-one of the published code (G-HANet, deviation D1).
      clip: bound on standardised values, or None.
      loss: terms and weights.
      bins_from: "cohort" as published (D3), or "train_fold".
      sampler: one of `sampling.SAMPLERS`.
      b: patients per update.
      remainder: of an epoch's draws, see `windows.accumulation_windows`.
      lr: initial rate.
      schedule: one of `schedules.SCHEDULES`, or "constant".
      optimizer: "adam_l2" (decay in the gradient) or "adamw".
      wd: weight decay.
      epochs: number of epochs; the last state counts.
      widths: of the network.
      dropout: of the network.
      n_bins: time bins.
    """

    metadata: str = "positional"
    clip: float | None = None
    loss: ObjectiveSpec = ObjectiveSpec(l1=1e-4, l1_scaling=PER_BAG)
    bins_from: str = "cohort"
    sampler: str = BALANCED
    b: int = 32
    remainder: str = CARRY
    lr: float = 2e-4
    schedule: str = CONSTANT
    optimizer: str = ADAM_L2
    wd: float = 1e-5
    epochs: int = 20
    widths: tuple[int, ...] = (256, 256, 256, 256)
    dropout: float = 0.25
    n_bins: int = 4


PUBLISHED = Recipe()
"""MCAT's recipe (survival_baselines, sections 1 and 2; G-HANet, section 6)."""


def recipe_of(cfg: ConfigDict) -> Recipe:
    """The recipe that a named configuration of the method `supervised` asks for."""
    train, model = cfg.train, cfg.model.snn
    return Recipe(
        metadata=cfg.data.get("metadata", "by_name"),
        clip=cfg.genes.clip,
        loss=ObjectiveSpec(**dict(cfg.loss)),
        bins_from=cfg.survival.bins_from,
        sampler=train.sampler,
        b=train.b,
        remainder=train.get("remainder", DROP),
        lr=train.lr,
        schedule=train.lr_schedule,
        optimizer=train.get("optimizer", ADAMW),
        wd=train.wd,
        epochs=train.max_epochs,
        widths=tuple(model.widths),
        dropout=model.dropout,
        n_bins=cfg.survival.n_bins,
    )


def read_cohort(data: pathlib.Path, source: str, name: str, *, metadata: str = "by_name") -> GeneCohort:
    """One cohort of MCAT or PORPOISE.

    Args:
      data: folder of real data.
      source: key of `TABLES`.
      name: cohort in lower case.
      metadata: see `Recipe`.

    Returns:
      The patients of the table with genes, follow-up and folds.

    Raises:
      DataError: the files contradict each other, or the folds do not partition the patients.
    """
    folder = data / "tcga_genomics" / source
    path = folder / TABLES[source] / f"tcga_{name}_all_clean.csv.zip"
    table, follow_up = read_molecular_table(path, metadata=metadata), read_survival(path)
    if table.case_id != follow_up.case_id:
        raise DataError(f"{path}: genes and follow-up list different patients")
    n = len(table.case_id)
    # Slides are not read: every patient stands for one.
    patients = Cohort(table.case_id, np.arange(n, dtype=np.int32), table.case_id, np.full(n, -1, np.int32))
    folds = splits.read_folds(
        folder / "splits/5foldcv" / f"tcga_{name}", patients, stratify=False, protocol=splits.PUBLISHED
    )
    splits.check_partition(folds, patients)
    return GeneCohort(table, follow_up.survival.time_months, follow_up.survival.event, tuple(folds))


def fold_inputs(cohort: GeneCohort, split: splits.Split, *, clip: float | None, metadata: str) -> np.ndarray:
    """[n, K] float32 features of all patients, standardised on the training patients of one fold."""
    table = cohort.table
    if metadata == "positional":
        # The library refuses columns that tell the answer; the published code reads one, so it gets another name here.
        names = tuple(f"{name} (metadata)" if name in NEVER_FEATURES else name for name in table.names)
        table = dataclasses.replace(table, names=names)
    return select_columns(table, split.train, clip=clip).apply_table(table)


def time_bins(cohort: GeneCohort, recipe: Recipe, fold: int) -> np.ndarray:
    """[n] int32 time bin of every patient as the training of one fold sees it."""
    split, train = cohort.folds[fold], np.zeros(len(cohort.time), bool)
    train[split.train] = True
    bins = fit_time_bins(
        cohort.time, cohort.event, num_bins=recipe.n_bins, bins_from=recipe.bins_from, train=train
    ).assign(cohort.time)
    check_folds(bins, cohort.event, train, ~train, num_bins=recipe.n_bins, fold=fold)
    return bins


def plan_updates(recipe: Recipe, train: np.ndarray, classes: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """What every micro-step of a training reads.

    Args:
      recipe: sampler, windows, schedule.
      train: [m] rows of the training patients.
      classes: [n] int, sampling class of every patient.
      seed: of the draws.

    Returns:
      "rows" [M, b] int32 and "valid" [M, b] bool: patients of a micro-step; "update" [M] bool: the accumulated gradient
      is applied after it; "rate" [M] float32.
    """
    num_draws = len(train) if recipe.remainder == CARRY else len(train) // recipe.b * recipe.b
    drawn = [_draw(recipe, train, classes[train], num_draws, seed, epoch) for epoch in range(recipe.epochs)]
    rows, update, rate = [], [], []
    for epoch, windows in enumerate(accumulation_windows(num_draws, recipe.b, recipe.epochs, recipe.remainder)):
        lr = recipe.lr
        if recipe.schedule != CONSTANT:
            lr = learning_rate(recipe.schedule, recipe.lr, epoch=epoch, max_epochs=recipe.epochs)
        for window in windows:
            samples = [drawn[e][i] for e, i in window.samples]
            parts = [samples[i : i + recipe.b] for i in range(0, len(samples), recipe.b)]
            rows += parts
            update += [False] * (len(parts) - 1) + [True]
            rate += [lr] * len(parts)
    table = np.full((len(rows), recipe.b), -1, np.int32)
    for row, part in zip(table, rows):
        row[: len(part)] = part
    return {
        "rows": np.maximum(table, 0),
        "valid": table >= 0,
        "update": np.array(update, bool),
        "rate": np.array(rate, np.float32),
    }


def _draw(recipe, train, classes, num_draws, seed, epoch) -> np.ndarray:
    rng = sampling.epoch_rng(seed, epoch, sampling.Stream.DRAW)
    sizes = np.ones(len(train))
    return train[sampling.draw_epoch(sizes, classes, num_draws, sampler=recipe.sampler, stratified=False, rng=rng)]


def train_risks(cohort: GeneCohort, recipe: Recipe, seeds: Sequence[int]) -> np.ndarray:
    """Trains every seed and fold in one program.

    Args:
      cohort: patients and folds, read with the recipe's `metadata`.
      recipe: how.
      seeds: of initialisation, draws and dropout.

    Returns:
      [seeds, n] float64 risk of every patient in the fold that reports it; higher is earlier death.
    """
    folds = range(len(cohort.folds))
    options = dict(clip=recipe.clip, metadata=recipe.metadata)
    bins = [time_bins(cohort, recipe, k) for k in folds]
    data = {
        "genes": np.stack([fold_inputs(cohort, split, **options) for split in cohort.folds]),
        "label": np.stack(bins),
        "event": cohort.event.astype(np.float32),
        "time_months": cohort.time.astype(np.float32),
    }
    plans = [
        plan_updates(recipe, split.train, sampling_class(bins[k], cohort.event), seed)
        for seed in seeds
        for k, split in enumerate(cohort.folds)
    ]
    replicas = _stack_plans(plans)
    replicas["fold"] = np.tile(np.arange(len(folds), dtype=np.int32), len(seeds))
    replicas["seed"] = np.repeat(np.asarray(seeds, np.uint32), len(folds))
    risk = np.asarray(_program(recipe)(data, replicas), np.float64).reshape(len(seeds), len(folds), -1)
    return np.take_along_axis(risk, cohort.fold[None, None, :].repeat(len(seeds), 0), axis=1)[:, 0]


def _stack_plans(plans: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Plans of folds of different size, padded with micro-steps that hold no patient and update nothing."""
    longest = max(len(plan["update"]) for plan in plans)

    def pad(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, longest - len(array))] + [(0, 0)] * (array.ndim - 1))

    return {name: np.stack([pad(plan[name]) for plan in plans]) for name in plans[0]}


def _program(recipe: Recipe):
    """(data, replicas) -> [R, n] risk of all patients after the last update."""

    @jax.jit
    def run(data: Mapping[str, Any], replicas: Mapping[str, Any]) -> jax.Array:
        return jax.lax.map(lambda replica: _one_training(recipe, data, replica), dict(replicas))

    return run


def _one_training(recipe: Recipe, data: Mapping[str, Any], replica: Mapping[str, Any]) -> jax.Array:
    genes, label = data["genes"][replica["fold"]], data["label"][replica["fold"]]
    cox = recipe.loss.survival == COX
    net = SnnNet(genes.shape[1], 1 if cox else recipe.n_bins, recipe.widths, recipe.dropout)
    key = jax.random.fold_in(jax.random.key(replica["seed"]), replica["fold"])
    init_key, drop_key = jax.random.split(key)
    params = net.init(init_key, None, {"genes": genes[:1]})["params"]
    optimizer = _optimizer(recipe)

    def loss_fn(params: Any, step: Mapping[str, Any], seed: jax.Array) -> jax.Array:
        rows, where = step["rows"], step["valid"]
        logits = net.apply({"params": params}, None, {"genes": genes[rows]}, seed)["logits"]
        batch = {"label": label[rows], "event": data["event"][rows], "time_months": data["time_months"][rows]}
        number = jnp.sum(where).astype(jnp.float32)
        loss = bag_loss(recipe.loss, logits, batch, where) * number / recipe.b
        if recipe.loss.l1:
            norm = sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(params))
            bags = number if recipe.loss.l1_scaling == PER_BAG else step["update"].astype(jnp.float32)
            loss += recipe.loss.l1 * bags * norm
        return loss

    def body(carry: Any, step: Mapping[str, Any]) -> tuple[Any, None]:
        params, state, total = carry
        seed = jax.random.bits(jax.random.fold_in(drop_key, step["number"]), (), jnp.uint32)
        total = jax.tree.map(jnp.add, total, jax.grad(loss_fn)(params, step, seed))

        def apply(params, state, total):
            change, state = optimizer.update(total, state, params)
            params = jax.tree.map(lambda p, d: p - step["rate"] * d, params, change)
            return params, state, jax.tree.map(jnp.zeros_like, total)

        return jax.lax.cond(step["update"], apply, lambda *same: same, params, state, total), None

    steps = {name: replica[name] for name in ("rows", "valid", "update", "rate")}
    steps["number"] = jnp.arange(len(steps["update"]))
    start = (params, optimizer.init(params), jax.tree.map(jnp.zeros_like, params))
    (params, *_), _ = jax.lax.scan(body, start, steps)
    logits = net.apply({"params": params}, None, {"genes": genes})["logits"]
    return logits[:, 0] if cox else risk_score(logits)


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Adam without its rate; the decay is in the gradient (coupled, as published) or beside it."""
    adam, decay = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8), optax.add_decayed_weights(recipe.wd)
    return optax.chain(decay, adam) if recipe.optimizer == ADAM_L2 else optax.chain(adam, decay)
