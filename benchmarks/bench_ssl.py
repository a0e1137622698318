"""Images per second of a TriDeNT training step, with and without augmentation, against a PyTorch step of our own.

Compute only, without input: ResNet-50 (Keras' version 1), projectors of 3 x 8192, VICReg over three branches, Adam with
every gradient clipped on its own. An image is one example, which passes three branches. The peer has no augmentation,
so it is compared with the plain side; the share of augmentation is the difference between the two sides of this
library, which share one state. Two networks with Adam take 5.6 GB on each side. Measure on a quiet machine.

    python -m benchmarks.bench_ssl [--smoke] [--sizes 224] [--batches 8 16] [--sides ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bench_step, common
from histokd_jax.methods.ssl import config as settings
from histokd_jax.methods.ssl import method as ssl
from histokd_jax.train import optim
from histokd_jax.types import REPRESENTATION, DataSpec, Method

SEED, RATE = 0, 1e-4
AUGMENTED, PLAIN, BFLOAT16 = "trident", "trident_plain", "trident_plain_bfloat16"
EAGER, GRAM = "torch_eager", "torch_gram"
JAX_SIDES = {AUGMENTED: ("a4", "float32"), PLAIN: ("none", "float32"), BFLOAT16: ("none", "bfloat16")}
"""Side -> (augmentation, type of products)."""
SIDES = (*JAX_SIDES, EAGER, GRAM)
FULL = {
    "sizes": [224], "batches": [8, 16], "sides": [AUGMENTED, PLAIN, EAGER, GRAM], "repeats": 5, "steps": 1, "model": {},
}  # fmt: skip
SMOKE = {
    "sizes": [32], "batches": [4], "sides": [AUGMENTED, PLAIN, EAGER, GRAM], "repeats": 2, "steps": 1,
    "model": {"encoder.blocks": (1, 1), "encoder.width": 4, "projector.widths": (16, 16)},
}  # fmt: skip

Side = Callable[[], Any]


def make_method(config: Mapping[str, Any], side: str, size: int, batch: int) -> Method:
    """TriDeNT with the settings of a side; all examples have a partner, so batch statistics need no mask."""
    preset, dtype = JAX_SIDES[side]
    cfg = ssl.default_config()
    changes = {"augment.preset": preset, "train.compute_dtype": dtype, "train.b": batch, "bn.mask_missing": False}
    cfg.update_from_flattened_dict({**changes, **config["model"]})
    return ssl.make_method(cfg, DataSpec(0, 0, task=REPRESENTATION, image_size=(size, size)))


def make_batch(size: int, batch: int) -> dict[str, jax.Array]:
    """Noise images in device memory."""
    rng = np.random.default_rng(SEED)
    shape = (batch, size, size, 3)
    pair = {name: jnp.asarray(rng.integers(0, 256, shape, np.uint8)) for name in ("image", "partner")}
    numbers = {"example": jnp.arange(batch, dtype=jnp.int32), "weight": jnp.ones(batch)}
    return {**pair, **numbers, "has_partner": jnp.ones(batch, bool)}


def training_step(run: Method, groups: tuple[str, ...]) -> tuple[Callable[..., Any], Any]:
    """(step (state, batch, number) -> (state, loss), optimizer)."""
    options = {"trainable": groups, "groups": groups, "eps": 1e-7, "clip_per_tensor": 1.0}
    tx = optim.make_optimizer(weight_decay=0.0, decay_bias=True, **options)

    def step(state, batch, number):
        params, extra, opt_state = state

        def loss(params):
            outputs, new = run.forward(params, {}, extra, batch, jax.random.key(number), True)
            return run.objective(outputs, batch, 0, ssl.PRETRAIN)[0], new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (jax.tree.map(lambda p, u: p - RATE * u, params, updates), new, opt_state), value

    return step, tx


def jax_sides(config: Mapping[str, Any], size: int, batch: int) -> dict[str, Side]:
    """Warmed-up steps of the JAX sides, which take turns on one state."""
    names = [name for name in config["sides"] if name in JAX_SIDES]
    if not names:
        return {}
    data, runs = make_batch(size, batch), {name: make_method(config, name, size, batch) for name in names}
    params, extra = jax.jit(runs[names[0]].init)(jax.random.key(SEED))
    first_tx = training_step(runs[names[0]], tuple(params))[1]
    state = [(params, extra, first_tx.init(params)), 0]
    sides = {
        name: _turn(jax.jit(training_step(run, tuple(params))[0], donate_argnums=0), state, data)
        for name, run in runs.items()
    }
    for once in sides.values():
        once()
    return sides


def _turn(compiled: Callable[..., Any], state: list[Any], data: Mapping[str, jax.Array]) -> Side:
    """One step that moves a shared state on."""

    def once():
        state[0], loss = compiled(state[0], data, state[1])
        state[1] += 1
        return jax.block_until_ready(loss)

    return once


def torch_sides(config: Mapping[str, Any], size: int, batch: int) -> dict[str, Side]:
    """Warmed-up steps of the peer, which take turns on one state; weights as in the library."""
    names = [name for name in config["sides"] if name in (EAGER, GRAM)]
    if not names:
        return {}
    import torch

    from benchmarks import torch_peer, torch_ssl

    cfg = ssl.default_config()
    cfg.update_from_flattened_dict(config["model"])
    net = torch_ssl.TridentPeer(settings.encoder_spec(cfg, settings.RESNET, size), tuple(cfg.projector.widths))
    net.load(jax.jit(make_method(config, PLAIN, size, batch).init)(jax.random.key(SEED))[0])
    device, data = torch_peer.device_for(jax.default_backend()), make_batch(size, batch)
    net = net.to(device).train()
    image, partner = (
        torch.tensor(np.moveaxis(np.asarray(data[name]), -1, 1)).to(device).float() for name in ("image", "partner")
    )
    step, sides = torch_ssl.make_step(net, RATE), {}
    for name in names:
        sides[name] = lambda gram=name == GRAM: step((image, image, partner), gram)
        sides[name]()
    return sides


def rate(once: Side, batch: int, steps: int) -> float:
    """Images per second over some steps."""
    start = time.perf_counter()
    for _ in range(steps):
        once()
    return batch * steps / (time.perf_counter() - start)


def measure_cell(config: Mapping[str, Any], size: int, batch: int) -> tuple[dict, dict]:
    """(metrics, facts) of one image size and batch."""
    sides = jax_sides(config, size, batch) | torch_sides(config, size, batch)
    measured = {name: lambda once=once: rate(once, batch, config["steps"]) for name, once in sides.items()}
    values = common.alternate(measured, config["repeats"])
    cell = f"{size} px, batch {batch}"
    metrics = {f"{name}[{cell}]": common.metric(found, "images/s") for name, found in values.items()}
    return metrics, {cell: compare(values)}


def compare(values: Mapping[str, list[float]]) -> dict[str, Any]:
    """Share of augmentation, and the plain side against the better peer: medians over rounds."""
    found: dict[str, Any] = {}
    if AUGMENTED in values and PLAIN in values:
        found["augmentation_share"] = 1.0 - float(np.median(np.divide(values[AUGMENTED], values[PLAIN])))
    peers = [name for name in (EAGER, GRAM) if name in values]
    if peers and PLAIN in values:
        better = max(peers, key=lambda name: float(np.median(values[name])))
        ratio = float(np.median(np.divide(values[PLAIN], values[better])))
        found |= {"better_peer": better, "plain_over_peer": ratio}
    return found


def run(config: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Measures every cell and writes the result."""
    config, metrics, derived = dict(config), {}, {"smoke": args.smoke}
    if importlib.util.find_spec("torch") is None:
        absent = [side for side in (EAGER, GRAM) if side in config["sides"]]
        config["sides"] = [side for side in config["sides"] if side not in absent]
        derived["not_measured"] = dict.fromkeys(absent, "PyTorch is not installed")
    for size in config["sizes"]:
        for batch in config["batches"]:
            found, facts = measure_cell(config, size, batch)
            metrics, derived = metrics | found, derived | facts
    notes = (
        "Compute only, optimizer included; sides of a cell in turn in one process. An image passes three branches. The "
        "peer has no augmentation: it is compared with trident_plain. torch_eager forms D x D covariances, torch_gram "
        "does not."
    )
    return common.write_result(
        bench_step.result_path(args, "bench_ssl"),
        benchmark="bench_ssl",
        config=config,
        metrics=metrics,
        derived=derived,
        notes=notes,
        devices=(jax.devices()[0].device_kind, 1),
    )


def main() -> None:
    """Command line."""
    parser = common.parser("bench_ssl", __doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", help="sides of the images in pixels")
    parser.add_argument("--batches", type=int, nargs="+", help="images per step")
    parser.add_argument("--sides", nargs="+", choices=SIDES)
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in ("sizes", "batches", "sides") if getattr(args, name)}
    run({**(SMOKE if args.smoke else FULL), **given}, args)


if __name__ == "__main__":
    main()
