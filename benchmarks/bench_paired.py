"""Images per second of CoCoFNet and its student, training and inference, against a PyTorch student of the same lines.

Compute only, without input; a training step holds flips, standardisation, both passes and the optimizer. The teacher's
images are pairs. All sides of a cell take turns in one process. Training needs two images per step, so cells of one
image have inference alone. `--memory` reports the temporaries of a first-stage step from the compiled program, and
`--execute` runs one such step as well. Measure on a quiet machine.

    python -m benchmarks.bench_paired [--smoke] [--sizes 256 1024] [--batches 1 4 16 64] [--sides ...] [--out FILE]
    python -m benchmarks.bench_paired --memory --execute --sizes 1024 --batches 16
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
import optax

from benchmarks import bench_step, common
from histokd_jax.methods.hmkd import images, torch_keys
from histokd_jax.methods.hmkd import method as hmkd
from histokd_jax.methods.hmkd.config import paired_spec
from histokd_jax.types import DataSpec

SEED, CLASSES = 0, 4
TEACHER, STUDENT = "teacher", "student"
EAGER, COMPILED = "torch_eager", "torch_compiled"
TRAIN, INFERENCE = "train", "inference"
TASKS = (TRAIN, INFERENCE)
# side -> (network, compute dtype, form of the depth-wise convolutions)
JAX_SIDES = {
    "student": (STUDENT, "float32", "shifts"),
    "student_grouped": (STUDENT, "float32", "grouped"),
    "student_bfloat16": (STUDENT, "bfloat16", "shifts"),
    "teacher": (TEACHER, "float32", "shifts"),
    "teacher_bfloat16": (TEACHER, "bfloat16", "shifts"),
}
SIDES = (*JAX_SIDES, EAGER, COMPILED)
TARGET = {"size": 1024, "batch": 16, "ratio": 1.0}
"""The cell in which the student should be faster than the better peer on a CPU."""
FULL = {
    "sizes": [256, 1024], "batches": [1, 4, 16, 64], "sides": ["student", "teacher", EAGER, COMPILED], "repeats": 5,
    "steps": 2, "model": {},
}  # fmt: skip
SMOKE = {
    "sizes": [16], "batches": [2], "sides": ["student", EAGER], "repeats": 2, "steps": 1,
    "model": {
        "widths": (32, 40, 48, 64), "stem_patch": 2, "teacher_depths": (1, 0, 0, 0), "student_depths": (1, 0, 0, 0),
        "mlp_ratio": 2, "head_hidden": 8,
    },
}  # fmt: skip

Side = Callable[[], Any]


def settings(config: Mapping[str, Any], side: str = "student") -> Any:
    """The configuration of a side: every network alone."""
    network, dtype, form = JAX_SIDES.get(side, JAX_SIDES["student"])
    cfg = hmkd.default_config()
    changes = {f"model.{key}": value for key, value in config["model"].items()}
    changes |= {"train.compute_dtype": dtype, "model.depthwise": form}
    changes |= {"distill.schedule": "teacher_only"} if network == TEACHER else dict(hmkd.CONTROL)
    cfg.update_from_flattened_dict(changes)
    return cfg


def make_batch(size: int, batch: int, images: bool = True) -> dict[str, Any]:
    """Noise images and labels; shapes alone without `images`."""
    rng = np.random.default_rng(SEED)
    shape = (batch, size, size, 3)
    draw = lambda: jnp.asarray(rng.integers(0, 256, shape, np.uint8))  # noqa: E731
    pair = {name: draw() if images else jax.ShapeDtypeStruct(shape, jnp.uint8) for name in ("image", "partner")}
    ones = jnp.ones(batch, bool)
    answers = {"has_partner": ones, "has_label": ones, "label": jnp.arange(batch, dtype=jnp.int32) % CLASSES}
    return {**pair, **answers, "example": jnp.arange(batch, dtype=jnp.int32), "weight": jnp.ones(batch)}


def make_run(config: Mapping[str, Any], side: str) -> tuple[Any, str]:
    """(method, name of its network) of a side."""
    return hmkd.make_method(settings(config, side), DataSpec(feat_dim=0, num_classes=CLASSES)), JAX_SIDES[side][0]


def training_step(run: Any, network: str) -> tuple[Callable[..., Any], optax.GradientTransformation]:
    """(step (state, batch, number) -> (state, loss), optimizer) of the published recipe."""
    tx = optax.chain(optax.add_decayed_weights(5e-4), optax.trace(0.9))

    def step(state, batch, number):
        params, extra, opt_state = state

        def loss(params):
            outputs, new = run.forward(params, {}, extra, batch, jax.random.key(number), True, stage=network)
            return run.objective(outputs, batch, 0, network)[0], new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (jax.tree.map(lambda p, u: p - 1e-3 * u, params, updates), new, opt_state), value

    return step, tx


def jax_side(config: Mapping[str, Any], side: str, task: str, size: int, batch: int) -> Side:
    """One warmed-up step of a JAX side."""
    run, network = make_run(config, side)
    params, extra = jax.jit(run.init)(jax.random.key(SEED))
    data = make_batch(size, batch)
    if task == INFERENCE:
        predict = jax.jit(lambda p, e, b: run.predict(p, {}, e, b, run.modes[0].name)["prob"])
        once = lambda: jax.block_until_ready(predict(params, extra, data))  # noqa: E731
    else:
        step, tx = training_step(run, network)
        compiled, state = jax.jit(step, donate_argnums=0), [(params, extra, tx.init(params)), 0]

        def once():
            state[0], loss = compiled(state[0], data, state[1])
            state[1] += 1
            return jax.block_until_ready(loss)

    once()
    return once


def torch_side(config: Mapping[str, Any], side: str, task: str, size: int, batch: int) -> Side:
    """One warmed-up step of the peer, with the weights of the JAX student, standardisation included."""
    import torch

    from benchmarks import torch_paired

    cfg = settings(config)
    spec, device = paired_spec(cfg, CLASSES), peer_device()
    net = torch_paired.StudentPeer(spec)
    params, extra = jax.jit(make_run(config, "student")[0].init)(jax.random.key(SEED))
    net.load(torch_keys.to_torch(params[STUDENT], extra[STUDENT], spec, STUDENT))
    net = net.to(device).train(task == TRAIN)
    data = make_batch(size, batch)
    image = torch.tensor(np.moveaxis(np.asarray(data["image"]), -1, 1)).to(device)
    label = torch.tensor(np.asarray(data["label"])).long().to(device)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1).to(device) for v in (images.MEAN, images.STD))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    forward = torch.compile(net) if side == COMPILED else net

    def once():
        x = (image.float() / 255.0 - mean) / std
        if task == TRAIN:
            return torch_paired.train_step(forward, optimizer, x, label)
        with torch.inference_mode():
            return forward(x)[0].cpu()

    once()
    return once


def peer_device() -> Any:
    """The PyTorch device of the same kind as JAX's backend."""
    from benchmarks import torch_peer

    return torch_peer.device_for(jax.default_backend())


def rate(once: Side, batch: int, steps: int) -> float:
    """Images per second over some steps."""
    start = time.perf_counter()
    for _ in range(steps):
        once()
    return batch * steps / (time.perf_counter() - start)


def measure_cell(config: Mapping[str, Any], task: str, size: int, batch: int) -> tuple[dict, dict]:
    """(metrics, facts) of one task, image size and batch."""
    if task == TRAIN and batch < 2:
        return {}, {}
    makers = {side: jax_side if side in JAX_SIDES else torch_side for side in config["sides"]}
    sides = {name: make(config, name, task, size, batch) for name, make in makers.items()}
    measured = {name: lambda once=once: rate(once, batch, config["steps"]) for name, once in sides.items()}
    values = common.alternate(measured, config["repeats"])
    cell = f"{task}, {size} px, batch {batch}"
    metrics = {f"{name}[{cell}]": common.metric(found, "images/s") for name, found in values.items()}
    return metrics, {cell: compare(values, size, batch)}


def compare(values: Mapping[str, list[float]], size: int, batch: int) -> dict[str, Any]:
    """The student against the better peer: median over rounds of their ratio."""
    peers = [name for name in (EAGER, COMPILED) if name in values]
    if not peers or "student" not in values:
        return {}
    better = max(peers, key=lambda name: float(np.median(values[name])))
    ratio = float(np.median(np.divide(values["student"], values[better])))
    found = {"better_peer": better, "student_over_peer": ratio}
    if (size, batch) == (TARGET["size"], TARGET["batch"]):
        found["meets_target"] = ratio > TARGET["ratio"]
    return found


def step_memory(config: Mapping[str, Any], size: int, batch: int, execute: bool) -> dict[str, Any]:
    """Temporaries of a step of the first stage by the compiled program, and whether one such step ran."""
    run, network = make_run(config, "teacher")
    step, tx = training_step(run, network)
    params, extra = jax.jit(run.init)(jax.random.key(SEED))
    state = params, extra, tx.init(params)
    compiled = jax.jit(step, donate_argnums=0).lower(state, make_batch(size, batch, execute), 0).compile()
    memory = compiled.memory_analysis()
    found = {"temporaries_gib": memory.temp_size_in_bytes / 2**30, "executed": False}
    if execute:
        start = time.perf_counter()
        _, loss = compiled(state, make_batch(size, batch), 0)
        found |= {"executed": bool(np.isfinite(float(loss))), "seconds": time.perf_counter() - start}
    return found


def run(config: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Measures every cell and writes the result."""
    config, metrics, derived = dict(config), {}, {"smoke": args.smoke}
    if importlib.util.find_spec("torch") is None:
        absent = [side for side in (EAGER, COMPILED) if side in config["sides"]]
        config["sides"] = [side for side in config["sides"] if side not in absent]
        derived["not_measured"] = dict.fromkeys(absent, "PyTorch is not installed")
    for size in config["sizes"]:
        for batch in config["batches"]:
            for task in TASKS if not args.memory else ():
                found, facts = measure_cell(config, task, size, batch)
                metrics, derived = metrics | found, derived | facts
            if args.memory and batch >= 2:
                cell = f"first stage, {size} px, batch {batch}"
                derived[cell] = found = step_memory(config, size, batch, args.execute)
                metrics[f"temporaries[{cell}]"] = common.metric([found["temporaries_gib"]], "GiB")
    notes = (
        "Compute only, optimizer included; sides of a cell in turn in one process. A teacher's image is a pair. Ratio: "
        "median over rounds of the student against the better PyTorch peer."
    )
    return common.write_result(
        bench_step.result_path(args, "bench_paired"),
        benchmark="bench_paired",
        config=config,
        metrics=metrics,
        derived=derived,
        notes=notes,
        devices=(jax.devices()[0].device_kind, 1),
    )


def main() -> None:
    """Command line."""
    parser = common.parser("bench_paired", __doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", help="sides of the images in pixels")
    parser.add_argument("--batches", type=int, nargs="+", help="images per step")
    parser.add_argument("--sides", nargs="+", choices=SIDES)
    parser.add_argument("--memory", action="store_true", help="temporaries of a first-stage step instead of speed")
    parser.add_argument("--execute", action="store_true", help="with --memory: also run one step")
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in ("sizes", "batches", "sides") if getattr(args, name)}
    run({**(SMOKE if args.smoke else FULL), **given}, args)


if __name__ == "__main__":
    main()
