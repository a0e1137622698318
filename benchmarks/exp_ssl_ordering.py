"""What a privileged view does to an encoder of images: the ordering tests of More From Less and TriDeNT (F4), as found.

    python -m benchmarks.exp_ssl_ordering [--smoke] [--seeds 0 1 2] [--only trident privileged] [--out FILE]

Simulated images of 24 pixels. The label `shared` is the direction of stripes that are faint in the image, under a
strong smooth nuisance and noise, and plain in the privileged view. The label `own` is the frequency of a checkerboard
that only the image has. Encoders are trained without labels; a ridge classifier on the frozen features of the image is
compared on images of another draw. Expected: with a privileged view better on `shared` than without; TriDeNT keeps
`own`, the privileged Siamese loses it; a useless view costs TriDeNT nothing. Margins were fixed beforehand.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks import experiment as ex
from histokd_jax.methods.ssl import method as ssl
from histokd_jax.train import optim, schedules
from histokd_jax.types import REPRESENTATION, DataSpec, Method

SIDE, TRAIN, TEST = 24, 1024, 512
MARGIN = 0.03
"""By which one accuracy must exceed another to be above it; two are near each other within it."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "untrained": {"layout.name": "unprivileged"},
    "unprivileged": {"layout.name": "unprivileged"},
    "privileged": {"layout.name": "privileged"},
    "trident": {"layout.name": "trident"},
    "privileged_blank": {"layout.name": "privileged", "privileged.source": "blank"},
    "trident_blank": {"layout.name": "trident", "privileged.source": "blank"},
    "privileged_shuffled": {"layout.name": "privileged", "privileged.source": "shuffled"},
    "trident_shuffled": {"layout.name": "trident", "privileged.source": "shuffled"},
}
FULL = {"steps": 1500, "batch": 64, "lr": 1e-3, "width": 8, "blocks": (1, 1), "projector": (128, 128, 128)}
SMOKE = {"steps": 2, "batch": 8, "lr": 1e-3, "width": 4, "blocks": (1,), "projector": (8, 8)}


def simulate(seed: int, n: int) -> dict[str, np.ndarray]:
    """Images, their privileged views and both labels.

    Args:
      seed: of the draw.
      n: how many.

    Returns:
      image, partner [n, SIDE, SIDE, 3] uint8; shared, own [n] int 0 or 1, independent of each other.
    """
    rng = np.random.default_rng([seed, n])
    shared, own = rng.integers(0, 2, n), rng.integers(0, 2, n)
    y, x = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    along = np.where(shared[:, None, None] == 1, x[None], y[None])
    stripes = np.sin(2 * np.pi * along / 4.0 + rng.uniform(0, 2 * np.pi, (n, 1, 1)))
    period = np.where(own == 1, 3.0, 6.0)[:, None, None]
    phase = rng.uniform(0, 2 * np.pi, (2, n, 1, 1))
    checks = np.sin(2 * np.pi * x[None] / period + phase[0]) * np.sin(2 * np.pi * y[None] / period + phase[1])
    centre = rng.uniform(0, SIDE, (2, n, 1, 1))
    nuisance = np.exp(-((x[None] - centre[0]) ** 2 + (y[None] - centre[1]) ** 2) / (2 * (SIDE / 4) ** 2))
    image = 128 + 6 * stripes + 15 * checks + 80 * (nuisance - 0.3)
    partner = 128 + 70 * stripes
    tint = rng.uniform(-15, 15, (n, 1, 1, 3))
    noisy = [
        np.clip(plane[..., None] + colour + rng.normal(0, 10, (n, SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        for plane, colour in ((image, tint), (partner, np.zeros((n, 1, 1, 3))))
    ]
    return {"image": noisy[0], "partner": noisy[1], "shared": shared, "own": own}


def make_method(name: str, sizes: Mapping[str, Any]) -> Method:
    """A tiny network in the layout of a setting; flips alone, so that no augmentation hides a label."""
    cfg = ssl.default_config()
    cfg.update_from_flattened_dict(
        {
            "encoder.blocks": sizes["blocks"],
            "encoder.width": sizes["width"],
            "encoder.input": "standardised",
            "encoder.bn_momentum": 0.9,
            "projector.widths": sizes["projector"],
            "augment.preset": "hmkd_faithful",
            "augment.validation": "plain",
            "train.b": sizes["batch"],
            **SETTINGS[name],
        }
    )
    return ssl.make_method(cfg, DataSpec(0, 0, task=REPRESENTATION, image_size=(SIDE, SIDE)))


def batch_of(data: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """The step of some examples."""
    return {
        "image": data["image"][rows],
        "partner": data["partner"][rows],
        "has_partner": np.ones(len(rows), bool),
        "example": rows.astype(np.int32),
        "weight": np.ones(len(rows), np.float32),
    }


def fit(
    run: Method, data: Mapping[str, np.ndarray], sizes: Mapping[str, Any], seed: int, steps: int
) -> tuple[Any, Any]:
    """(parameters, running averages) after some steps of Adam with a cosine."""
    params, extra = jax.jit(run.init)(jax.random.key(seed))
    options = {"trainable": tuple(params), "groups": tuple(params), "eps": 1e-7, "clip_per_tensor": 1.0}
    tx = optim.make_optimizer(weight_decay=0.0, decay_bias=True, **options)

    @jax.jit
    def move(params, extra, opt, batch, key, rate):
        def loss(params):
            outputs, new = run.forward(params, {}, extra, batch, key, True)
            return run.objective(outputs, batch, 0, ssl.PRETRAIN)[0], new

        grads, new = jax.grad(loss, has_aux=True)(params)
        updates, opt = tx.update(grads, opt, params)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), new, opt

    rng, opt, key = np.random.default_rng([seed, 1]), tx.init(params), jax.random.key(seed + 1)
    for i in range(steps):
        rows = rng.choice(len(data["image"]), sizes["batch"], replace=False)
        rate = schedules.warmup_cosine(i + 1, peak=sizes["lr"], total=steps, warmup=min(steps // 10, steps - 1))
        params, extra, opt = move(
            params, extra, opt, batch_of(data, rows), jax.random.fold_in(key, i), jnp.float32(rate)
        )
    return params, extra


def features(run: Method, params: Any, extra: Any, data: Mapping[str, np.ndarray], batch: int) -> np.ndarray:
    """[n, features] of the primary encoder in inference mode; n is a multiple of the batch."""
    predict = jax.jit(lambda b: run.predict(params, {}, extra, b, ssl.VIEWS)["embedding"])
    parts = np.arange(len(data["image"])).reshape(-1, batch)
    return np.concatenate([np.asarray(predict(batch_of(data, rows))) for rows in parts])


def probe(train: np.ndarray, label: np.ndarray, test: np.ndarray, answers: np.ndarray, ridge: float = 1e-2) -> float:
    """Accuracy of a ridge classifier on standardised features."""
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-6
    a, b = ((x - mean) / std for x in (train, test))
    a, b = (np.concatenate([x, np.ones((len(x), 1))], axis=1) for x in (a, b))
    gram = a.T @ a + ridge * len(a) * np.eye(a.shape[1])
    weight = np.linalg.solve(gram, a.T @ (2.0 * label - 1.0))
    return float(np.mean((b @ weight > 0) == (answers == 1)))


def measure(name: str, seed: int, sizes: Mapping[str, Any]) -> dict[str, float]:
    """Accuracies of both labels for one setting and seed."""
    data, held_out = simulate(seed, TRAIN), simulate(seed + 1000, TEST)
    run = make_method(name, sizes)
    params, extra = fit(run, data, sizes, seed, 0 if name == "untrained" else sizes["steps"])
    found = [features(run, params, extra, part, sizes["batch"]) for part in (data, held_out)]
    return {label: probe(found[0], data[label], found[1], held_out[label]) for label in ("shared", "own")}


def verdicts(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """The orderings of F4 on means over seeds; those whose settings are absent are left out.

    Args:
      results: setting -> seed -> label -> accuracy.
    """
    mean = {name: {k: float(np.mean([s[k] for s in found.values()])) for k in ("shared", "own")}
            for name, found in results.items()}  # fmt: skip

    def above(a: str, b: str, label: str) -> Any:
        return None if {a, b} - set(mean) else mean[a][label] - mean[b][label]

    differences = {
        "F4_1 privileged above unprivileged on shared": (above("privileged", "unprivileged", "shared"), 1),
        "F4_1 trident above unprivileged on shared": (above("trident", "unprivileged", "shared"), 1),
        "F4_2 trident near unprivileged on own": (above("trident", "unprivileged", "own"), 0),
        "F4_2 privileged below unprivileged on own": (above("privileged", "unprivileged", "own"), -1),
    }
    for source in ("blank", "shuffled"):
        for label in ("shared", "own"):
            name = f"F4_3 trident with a {source} view near unprivileged on {label}"
            differences[name] = above(f"trident_{source}", "unprivileged", label), 0
        name = f"F4_3 privileged with a {source} view below privileged on shared"
        differences[name] = above(f"privileged_{source}", "privileged", "shared"), -1
    found = {}
    for name, (value, side) in differences.items():
        if value is not None:
            holds = value * side > MARGIN if side else abs(value) <= MARGIN
            found[name] = {"difference": value, "holds": bool(holds)}
    return {"mean": mean, "orderings": found, "margin": MARGIN}


def main() -> None:
    """Trains every setting and seed that is missing, prints and writes what was found."""
    parser = ex.parser(__doc__, "exp_ssl_ordering", real_data=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    args = parser.parse_args()
    ex.start(args)
    run(args.only, args.seeds, SMOKE if args.smoke else FULL, args.workdir, args.out)


def run(
    names: list[str], seeds: list[int], sizes: Mapping[str, Any], workdir: pathlib.Path, out: Any
) -> dict[str, Any]:
    """All settings and seeds; each is a file in `workdir`, so that an interrupted run continues."""
    workdir.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in names:
        for seed in seeds:
            path = workdir / f"{name}_{seed}.json"
            if not path.exists():
                begin = time.perf_counter()
                path.write_text(json.dumps(measure(name, seed, sizes)))
                print(f"{name}, seed {seed}: {path.read_text()} ({time.perf_counter() - begin:.0f} s)", flush=True)
            results.setdefault(name, {})[str(seed)] = json.loads(path.read_text())
    metrics = {
        f"{name}, {label}": common.metric([found[label] for found in by_seed.values()], "accuracy")
        for name, by_seed in results.items()
        for label in ("shared", "own")
    }
    return common.write_result(
        out,
        benchmark="exp_ssl_ordering",
        config={"sizes": {k: list(v) if isinstance(v, tuple) else v for k, v in sizes.items()}, "seeds": seeds},
        metrics=metrics,
        derived={"results": results, **verdicts(results)},
        notes="Simulated images; ridge probe on frozen features, another draw for testing. Means over seeds.",
        devices=(jax.devices()[0].device_kind, 1),
    )


if __name__ == "__main__":
    main()
