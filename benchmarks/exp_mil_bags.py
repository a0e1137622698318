"""Bag networks on real multiple-instance benchmarks: Musk1, Fox, Elephant, 10 folds x 5 seeds.

    python -m benchmarks.exp_mil_bags --data FOLDER [--only musk1/abmil ...]

ABMIL with plain and gated attention, DSMIL and Deep Sets behind the same 256-128-64 instance network; features
standardised on the training bags of each fold; Adam, one bag per step, a fixed number of epochs, no model selection.
Every (benchmark, model, seed) is a file in --workdir: an interrupted experiment continues, and the JSON holds what is
complete. `--only` restricts what is trained now.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np

from benchmarks import common, mil_bags
from benchmarks import experiment as ex
from data_pipelines import mil_classic, table_files
from histokd_jax.train.replica_step import AUTO, resolve_loop

RECIPES = {
    "musk1": mil_bags.Recipe(lr=5e-4, wd=5e-3),
    "fox": mil_bags.Recipe(lr=5e-4, wd=5e-3),
    "elephant": mil_bags.Recipe(lr=1e-4, wd=5e-3),
}
# Accuracy of Ilse et al., ICML 2018: 5 repetitions of 10 folds, mean and standard deviation as published.
PUBLISHED = {
    "musk1": {"abmil": (0.892, 0.040), "gated_abmil": (0.900, 0.050)},
    "fox": {"abmil": (0.615, 0.043), "gated_abmil": (0.603, 0.029)},
}
GOALS = {"musk1": 0.86, "fox": 0.56}
SEEDS, FOLDS = 5, 10


def main() -> None:
    """Trains what is missing and writes the JSON."""
    parser = ex.parser(__doc__, "exp_mil_bags", real_data=True)
    names = [f"{data}/{model}" for data in RECIPES for model in mil_bags.MODELS]
    parser.add_argument(
        "--only", nargs="*", default=names, choices=names, metavar="DATA/MODEL", help="train only these"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--at-a-time", type=int, default=1, help="seeds of one program")
    args = parser.parse_args()
    ex.start(args)
    seeds, n_folds = (1, 2) if args.smoke else (args.seeds, FOLDS)
    for name in args.only:
        data, model = name.split("/")
        for first in range(0, seeds, args.at_a_time):
            wanted = [s for s in range(first, min(first + args.at_a_time, seeds)) if not _part(args, name, s).exists()]
            if wanted:
                train(args, data, model, wanted, n_folds)
    write(args, names, seeds, n_folds)


def read(folder: Any, name: str) -> mil_classic.MilBags:
    """One benchmark of the folder of real data."""
    if name == "fox":
        return mil_classic.read_mat(folder / "mil_classic" / "fox_original", name)
    return mil_classic.read_csv(folder / "mil_classic" / f"{name}.csv.gz")


def recipe_of(data: str, smoke: bool) -> mil_bags.Recipe:
    """The recipe of a benchmark."""
    return dataclasses.replace(RECIPES[data], epochs=2) if smoke else RECIPES[data]


def train(args: Any, data: str, model: str, seeds: list[int], n_folds: int) -> None:
    """Trains all folds of some seeds and keeps one file per seed."""
    loop = resolve_loop(AUTO, jax.devices()[0].platform)
    recipe = recipe_of(data, args.smoke)
    found = mil_bags.cross_validate(read(args.data, data), mil_bags.MODELS[model], recipe, seeds, n_folds, loop)
    for k, seed in enumerate(seeds):
        own = {metric: values[k] for metric, values in found.items()}
        table_files.write_json(_part(args, f"{data}/{model}", seed), {"recipe": dataclasses.asdict(recipe), **own})
        print(f"{data} {model} seed {seed}: accuracy {np.mean(own['accuracy']):.3f}, AUROC {np.mean(own['auroc']):.3f}")


def _part(args: Any, name: str, seed: int) -> Any:
    return args.workdir / name / f"seed_{seed}.json"


def write(args: Any, names: list[str], seeds: int, n_folds: int) -> None:
    """Gathers the files of all complete pairs."""
    derived: dict[str, Any] = {"smoke": True} if args.smoke else {}
    for name in names:
        data, model = name.split("/")
        parts = [json.loads(p.read_text()) for s in range(seeds) if (p := _part(args, name, s)).exists()]
        if len(parts) == seeds:
            _check_recipe(parts, recipe_of(data, args.smoke), args.workdir / name)
            derived.setdefault(data, {})[model] = summary(parts, data, model)
    common.write_result(
        args.out,
        benchmark="exp_mil_bags",
        config={
            "recipes": {data: dataclasses.asdict(recipe_of(data, args.smoke)) for data in RECIPES},
            "models": {name: dataclasses.asdict(model) for name, model in mil_bags.MODELS.items()},
            "projector": list(mil_bags.PROJECTOR),
            "folds": n_folds,
            "seeds": seeds,
        },
        metrics={},
        derived=derived,
        notes="Real data, no images. Accuracy at probability 0.5 and AUROC of the test bags after the last epoch; mean "
        "and population s.d. over folds x seeds, and s.d. of the seeds' means. Published values: Ilse et al. 2018. "
        "Absent pairs were not run to the end.",
        devices=(jax.devices()[0].device_kind, jax.device_count()),
    )


def _check_recipe(parts: list[dict[str, Any]], recipe: mil_bags.Recipe, folder: Any) -> None:
    for part in parts:
        if part["recipe"] != dataclasses.asdict(recipe):
            raise SystemExit(f"{folder} was trained with {part['recipe']}: remove it or give another --workdir")


def summary(parts: list[dict[str, Any]], data: str, model: str) -> dict[str, Any]:
    """Mean, s.d. over runs and over seeds of both metrics, beside what was published.

    Args:
      parts: per seed, metric -> value of each fold.
      data: benchmark.
      model: network.
    """
    found: dict[str, Any] = {}
    for metric in ("accuracy", "auroc", "train_loss"):
        values = np.array([part[metric] for part in parts])
        found[metric] = {
            "mean": float(values.mean()),
            "sd_runs": float(values.std()),
            "sd_seed_means": float(values.mean(axis=1).std()),
            "runs": values.size,
        }
    if model in PUBLISHED.get(data, {}):
        mean, sd = PUBLISHED[data][model]
        found["published_accuracy"] = {"mean": mean, "sd": sd}
        found["meets_goal"] = {"at_least": GOALS[data], "met": found["accuracy"]["mean"] >= GOALS[data]}
    return found


if __name__ == "__main__":
    main()
