"""G-HANet on a planted cohort: does it learn, find the planted patches, and rebuild the groups that carry signal?

    python -m benchmarks.exp_ghanet_planted [--seeds 0,1] [--vectors signs] [--cohort 0] [--torch] [--out FILE]

Check C27 of the specification: 120 training and 40 held-out patients with a latent z ~ N(0, 1); 40 to 60 patches
|N(0, 1)| in 1024-d, a fifth of them (at least five) shifted by 1 + 0.35 z on the first 64 coordinates; two gene groups
of 8 features are z times a fixed vector plus noise of s.d. 0.5, four are noise; death after an exponential time of mean
20 exp(-1.2 z), censoring after one of mean 40. 16 epochs, faithful network, windows of 8 patients, uniform order, Adam
with L2 in the gradient. Accepted: C-index >= 0.74, mass of Q on planted patches >= 0.95, cosine >= 0.3 for the two
groups, <= 0.2 in size for the others. It would prove that the parts learn, not that genomics helps.

State: NOT met as a whole (CPU; here one cohort per seed). The specification leaves the fixed vectors open, and they
decide: with normal ones the bag-by-bag PyTorch network of `torch_ghanet` (--torch) does not meet it either, and behaves
alike.

    seed 0           C-index 0.838, mass of Q 0.945, cosines of the signal groups -0.06, -0.02
    seed 0, PyTorch          0.776            0.973                                0.04,  0.11
    seed 1                   0.732            0.43 to 0.49                         0.05, -0.01
    seed 1, PyTorch          0.734            0.51 to 0.57                         0.01, -0.01

Vectors of +-1: one draw gave 0.811, 0.97, cosines 0.22 and 0.25 (without dropout 0.838, 0.949, 0.43 and 0.35); another,
`--vectors signs --cohort 0` with seed 0, 0.798, 0.97, cosines 0.02 and 0.00 (pooled 0.03 and 0.03), those of the noise
groups at most 0.09 in size: C-index, map and noise groups meet the check, the signal groups do not. Without dropout and
in the same order, training follows the PyTorch network step by step (tests/benchmarks), so what is missing lies in what
the specification leaves open.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from data_pipelines.survival import fit_time_bins
from histokd_jax.evals.survival.concordance import harrell_c
from histokd_jax.methods.ghanet.config import FAITHFUL, default_config
from histokd_jax.methods.ghanet.method import GHanet, make_run
from histokd_jax.types import DataSpec

GROUPS = (8,) * 6
FEAT, LENGTH, SIGNAL = 1024, 64, 64
TRAIN, TEST, WINDOW, EPOCHS = 120, 40, 8, 16
REFERENCE_C = 0.792
VECTORS = ("normal", "signs")
"""What the two signal groups are z times of: N(0, 1), or +-1, so that every feature carries the signal."""
ACCEPT = {"c_index": 0.74, "q_mass": 0.95, "signal": 0.3, "noise": 0.2}


class Cohort(NamedTuple):
    """n patients: patches [n, LENGTH, FEAT] with size [n], planted [n, LENGTH] bool, genes, bins, time, event, z."""

    patches: np.ndarray
    size: np.ndarray
    planted: np.ndarray
    genes: np.ndarray
    bins: np.ndarray
    time: np.ndarray
    event: np.ndarray
    z: np.ndarray

    def rows(self, index: np.ndarray) -> Cohort:
        """The patients of some rows."""
        return Cohort(*(field[index] for field in self))


def simulate(seed: int, vectors: str = "normal") -> Cohort:
    """Draws the cohort; the first TRAIN patients train, and genes are standardised on them.

    Args:
      seed: of the cohort.
      vectors: of `VECTORS`.
    """
    rng, n = np.random.default_rng(seed), TRAIN + TEST
    z = rng.normal(size=n)
    size = rng.integers(40, 61, n)
    patches = np.abs(rng.normal(size=(n, LENGTH, FEAT))).astype(np.float32)
    planted = np.zeros((n, LENGTH), bool)
    for i in range(n):
        planted[i, rng.permutation(size[i])[: max(5, round(0.2 * size[i]))]] = True
    patches[..., :SIGNAL] += (planted * (1 + 0.35 * z)[:, None])[..., None]
    directions = rng.normal(size=(2, 8))
    if vectors == "signs":
        directions = np.sign(directions)
    groups = [z[:, None] * d + 0.5 * rng.normal(size=(n, 8)) for d in directions]
    groups += [rng.normal(size=(n, 8)) for _ in range(4)]
    genes = np.concatenate(groups, axis=1)
    genes = (genes - genes[:TRAIN].mean(0)) / genes[:TRAIN].std(0)
    time_, event = _follow_up(rng, z)
    bins = fit_time_bins(time_, event).assign(time_)
    return Cohort(patches, size, planted, genes.astype(np.float32), bins, time_, event, z)


def _follow_up(rng: np.random.Generator, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Months and events, drawn again until z ranks the held-out patients as well as in the reference's cohort.

    40 patients leave the C-index of z itself anywhere between 0.65 and 0.9; the accepted values hold for 0.792.
    """
    while True:
        death, censoring = rng.exponential(20 * np.exp(-1.2 * z)), rng.exponential(40, len(z))
        months, event = np.minimum(death, censoring), death <= censoring
        if abs(harrell_c(z[TRAIN:], months[TRAIN:], event[TRAIN:]).value - REFERENCE_C) < 0.01:
            return months, event


def batch_of(cohort: Cohort) -> dict[str, np.ndarray]:
    """Patients as one bag per row."""
    n = len(cohort.z)
    length = cohort.patches.shape[1]
    valid = np.arange(length)[None] < cohort.size[:, None]
    return {
        "patches": cohort.patches,
        "segment_ids": np.where(valid, np.arange(1, n + 1)[:, None], 0).astype(np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (n, length)),
        "weight": np.ones(n, np.float32),
        "label": cohort.bins.astype(np.int32),
        "event": cohort.event.astype(np.float32),
        "time_months": cohort.time.astype(np.float32),
        "genes": cohort.genes,
    }


def build(rec_weight: float, overrides: Mapping[str, Any]) -> GHanet:
    """The faithful network with some settings replaced."""
    config = default_config()
    config.update_from_flattened_dict(dict(FAITHFUL))
    config.update_from_flattened_dict({"train.b": WINDOW, "loss.rec_weight": rec_weight, "data.pool": "segment"})
    config.update_from_flattened_dict(dict(overrides))
    return make_run(config, DataSpec(FEAT, 4, sum(GROUPS), "survival", GROUPS))


def fit(
    run: GHanet,
    cohort: Cohort,
    seed: int,
    epochs: int,
    learning_rate: float,
    params: Any = None,
    window: int = WINDOW,
) -> Any:
    """Parameters after training: uniform order, windows of patients, Adam with L2 in the gradient.

    Args:
      run: the networks.
      cohort: training patients.
      seed: of initialisation, order and dropout.
      epochs: passes.
      learning_rate: constant.
      params: where to begin; None: initialised.
      window: patients of a step.
    """
    tx = optax.chain(optax.add_decayed_weights(1e-5), optax.scale_by_adam(eps=1e-8), optax.scale(-learning_rate))
    params = jax.jit(run.init)(jax.random.key(seed))[0] if params is None else params
    state, rng, number = tx.init(params), np.random.default_rng(seed), 0

    def loss(params, batch, key):
        return run.objective(run.forward(params, {}, {}, batch, key, True)[0], batch)[0]

    def step(params, state, batch, key):
        updates, state = tx.update(jax.grad(loss)(params, batch, key), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(epochs):
        order = rng.permutation(len(cohort.z))
        for start in range(0, len(order) - window + 1, window):
            key = jax.random.fold_in(jax.random.key(seed), number)
            params, state = step(params, state, batch_of(cohort.rows(order[start : start + window])), key)
            number += 1
    return params


def predict(run: GHanet, params: Any, cohort: Cohort) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Risk [n], reconstruction [n, groups, 8] and Q [groups, N] of every patient."""
    batch = batch_of(cohort)
    details = jax.jit(run.details)(params, batch)
    risk = jax.jit(lambda p: run.predict(p, {}, {}, batch, "pathology")["risk"])(params)
    q = np.asarray(jax.jit(run.patch_weights)(params, batch)["Q"])
    parts = np.asarray(details["reconstruction"]).reshape(len(cohort.z), run.spec.tokens, -1)
    return np.asarray(risk), parts, [q[:, i, :n] for i, n in enumerate(cohort.size)]


def measure(cohort: Cohort, risk: np.ndarray, parts: np.ndarray, q: list[np.ndarray]) -> dict[str, Any]:
    """C-index, mass of Q on planted patches, cosine of reconstruction and target per group, of held-out patients.

    The cosine is the mean over patients; "cosines_pooled" takes a group's values of all patients as one vector, in
    which patients with a strong signal count more. The specification does not say which it means.
    """
    mass = np.mean([x @ planted[: x.shape[1]] for x, planted in zip(q, cohort.planted)], axis=0)
    target = cohort.genes.reshape(-1, len(GROUPS), 8)
    norms = np.linalg.norm(parts, axis=2) * np.linalg.norm(target, axis=2)
    together = np.linalg.norm(parts, axis=(0, 2)) * np.linalg.norm(target, axis=(0, 2))
    return {
        "c_index": harrell_c(risk.astype(np.float64), cohort.time, cohort.event).value,
        "c_index_of_z": harrell_c(cohort.z, cohort.time, cohort.event).value,
        "q_mass": mass.tolist(),
        "cosines": (np.sum(parts * target, axis=2) / norms).mean(axis=0).tolist(),
        "cosines_pooled": (np.sum(parts * target, axis=(0, 2)) / together).tolist(),
    }


def accepted(result: Mapping[str, Any], cosines: str = "cosines") -> bool:
    """Whether a result meets the numbers of the check, by one of its two cosines."""
    cosines = np.array(result[cosines])
    return bool(
        result["c_index"] >= ACCEPT["c_index"]
        and min(result["q_mass"]) >= ACCEPT["q_mass"]
        and cosines[:2].min() >= ACCEPT["signal"]
        and np.abs(cosines[2:]).max() <= ACCEPT["noise"]
    )


def experiment(
    seed: int,
    rec_weight: float = 0.3,
    epochs: int = EPOCHS,
    learning_rate: float = 2e-4,
    overrides: Mapping[str, Any] | None = None,
    vectors: str = "normal",
    cohort_seed: int | None = None,
) -> dict[str, Any]:
    """Simulates, trains and measures one seed; the cohort has the same seed unless it is given."""
    cohort = simulate(seed if cohort_seed is None else cohort_seed, vectors)
    run = build(rec_weight, overrides or {})
    params = fit(run, cohort.rows(np.arange(TRAIN)), seed, epochs, learning_rate)
    held_out = cohort.rows(np.arange(TRAIN, TRAIN + TEST))
    return measure(held_out, *predict(run, params, held_out))


def torch_experiment(
    seed: int, epochs: int = EPOCHS, vectors: str = "normal", cohort_seed: int | None = None
) -> dict[str, Any]:
    """The same with the bag-by-bag PyTorch network, for comparison."""
    from benchmarks import torch_ghanet

    cohort = simulate(seed if cohort_seed is None else cohort_seed, vectors)
    found = torch_ghanet.fit_and_predict(cohort, TRAIN, GROUPS, WINDOW, epochs, seed)
    return measure(cohort.rows(np.arange(TRAIN, TRAIN + TEST)), *found)


def main() -> None:
    """Runs the seeds, prints and writes the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--rec-weight", type=float, default=0.3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--width", type=int, default=512, help="model.dim; smaller widths are not the reference")
    parser.add_argument("--vectors", choices=VECTORS, default="normal", help="what the signal groups are z times of")
    parser.add_argument("--cohort", type=int, default=None, help="seed of the cohort; default: that of the training")
    parser.add_argument("--torch", action="store_true", help="train the PyTorch network of benchmarks.torch_ghanet")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    args = parser.parse_args()
    overrides = {"model.dim": args.width, "model.head_dim": args.width // 4}
    results = {}
    for seed in map(int, args.seeds.split(",")):
        begin = time.perf_counter()
        if args.torch:
            result = torch_experiment(seed, args.epochs, args.vectors, args.cohort)
        else:
            result = experiment(
                seed, args.rec_weight, args.epochs, overrides=overrides, vectors=args.vectors, cohort_seed=args.cohort
            )
        verdicts = {f"accepted_by_{name}": accepted(result, name) for name in ("cosines", "cosines_pooled")}
        results[str(seed)] = {**result, **verdicts, "seconds": time.perf_counter() - begin}
        print(json.dumps({"seed": seed, **results[str(seed)]}), flush=True)
    if args.out:
        settings = {"rec_weight": args.rec_weight, "epochs": args.epochs, "width": args.width}
        settings |= {"vectors": args.vectors, "cohort": args.cohort}
        args.out.write_text(json.dumps({"settings": settings, "accept": ACCEPT, "seeds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
