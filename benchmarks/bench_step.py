"""Training speed without input: packed JAX steps of the student S_P and of full MKD against a PyTorch bag loop.

All sides train on the same resident bags (log-normal sizes, b per step), include the optimizer, and take turns in one
process. The peer is the better of PyTorch eager and compiled, on all cores. Only the student is compared: it is what
the peer computes. Valid patches count, padding does not. Measure on a quiet machine: under contention the ratio means
nothing.

    python -m benchmarks.bench_step [--smoke] [--medians 100 1000 10000] [--sides student mkd ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from data_pipelines import schema
from data_pipelines.packing import PackPlan, PlanOptions, plan_coupled
from data_pipelines.pipeline import BatchAssembler, SlideTable, StepSource
from histokd_jax.methods.mkd.config import default_config
from histokd_jax.methods.mkd.method import make_method
from histokd_jax.train import optim, sharding, state, step
from histokd_jax.types import DataSpec, Method

SEED = 0
WARM_UP = 3
# Cores of foreign work up to which the machine counts as quiet. Contention stalls the peer's thread barriers much more
# than JAX, so that it would flatter the ratio.
QUIET = 0.1
# Wanted ratio of the student to the better peer, float32, by median bag size.
TARGETS = {100: 2.0, 1000: 1.3}
# side -> (method, dtype of the patches, compute dtype)
JAX_SIDES = {
    "student": ("student", "float32", "float32"),
    "student_float16_input": ("student", "float16", "float32"),
    "student_bfloat16": ("student", "float16", "bfloat16"),
    "mkd": ("mkd", "float32", "float32"),
    "mkd_float16_input": ("mkd", "float16", "float32"),
    "mkd_bfloat16": ("mkd", "float16", "bfloat16"),
}
EAGER, COMPILED = "torch_eager", "torch_compiled"
SIDES = (*JAX_SIDES, EAGER, COMPILED)
FULL = {
    "feat_dim": 1024, "genes": 8192, "token_size": 512, "model_d": 256, "model_attn": 128, "slides": 320, "sigma": 0.8,
    "slides_per_step": 16, "medians": [100, 1000], "chunk": 512, "row_multiple": 128, "resident_patches": 120_000,
    "window_patches": 400_000, "window_steps": 20, "repeats": 7,
    "sides": ["student", "student_float16_input", "mkd", EAGER, COMPILED],
}  # fmt: skip
SMOKE = {
    "feat_dim": 32, "genes": 64, "token_size": 32, "model_d": 16, "model_attn": 8, "slides": 12, "sigma": 0.8,
    "slides_per_step": 4, "medians": [20], "chunk": 64, "row_multiple": 32, "resident_patches": 200,
    "window_patches": 100, "window_steps": 2, "repeats": 2, "sides": ["student", "mkd", EAGER],
}  # fmt: skip


class NoiseReader:
    """Bags of noise in memory, in the place of a `BagReader`; contents do not matter to speed.

    Args:
      sizes: [n] patches per slide.
      feat_dim: D.
    """

    def __init__(self, sizes: np.ndarray, feat_dim: int):
        self.manifest = types.SimpleNamespace(sizes=sizes, feat_dim=feat_dim)
        self._pool = np.random.default_rng(SEED).standard_normal((4096, feat_dim), np.float32)

    def read_into(
        self, slide: int, start: int, count: int, out: np.ndarray, coords_out: np.ndarray | None = None
    ) -> None:
        """Fills `out` [count, D] with rows of the pool, from another offset for every slide."""
        out[:] = self._pool[(np.arange(start, start + count) + 37 * slide) % len(self._pool)]


def make_plan(sizes: np.ndarray, config: Mapping[str, Any], chunk_patches: int = 1) -> PackPlan:
    """One epoch of size-balanced packed steps of b slides."""
    options = PlanOptions(1, SEED, "uniform", multiple_of=config["row_multiple"], chunk_patches=chunk_patches)
    return plan_coupled(sizes, None, options, slides_per_step=config["slides_per_step"])


def slot_fields(slides: int, genes: int) -> dict[str, np.ndarray]:
    """Random labels and genes of n slides."""
    rng = np.random.default_rng(SEED)
    return {
        schema.LABEL: rng.integers(0, 2, slides),
        schema.GENES: rng.standard_normal((slides, genes), np.float32),
        schema.HAS_GENES: np.ones(slides, bool),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """The resident steps of one median bag size.

    Attributes:
      plan: all steps; the first ones are resident.
      batches: patch dtype -> host batches, equal but for the dtype.
      patches: valid patches of every resident step.
    """

    plan: PackPlan
    batches: Mapping[str, Sequence[Mapping[str, np.ndarray]]]
    patches: tuple[int, ...]


def make_workload(config: Mapping[str, Any], median: int) -> Workload:
    """Plans steps of log-normal bags and builds the first of them in memory, as the input pipeline would."""
    sizes = common.log_normal_sizes(config["slides"], median, config["sigma"], SEED)
    plan, table = make_plan(sizes, config), SlideTable(np.arange(len(sizes)), slot_fields(len(sizes), config["genes"]))
    count = min(max(1, config["resident_patches"] // plan.capacity), plan.steps_per_epoch)
    dtypes = {"float32", *(JAX_SIDES[side][1] for side in config["sides"] if side in JAX_SIDES)}
    batches = {}
    for dtype in sorted(dtypes):
        assemble = BatchAssembler(StepSource(NoiseReader(sizes, config["feat_dim"]), table, plan, dtype), slice(0, 1))
        batches[dtype] = [assemble(plan.step(0, i)) for i in range(count)]
    return Workload(plan, batches, tuple(int(plan.step(0, i).count.sum()) for i in range(count)))


def build_method(name: str, compute_dtype: str, config: Mapping[str, Any]) -> Method:
    """MKD with both teachers ("mkd") or without any ("student"), which leaves S_P and its cross-entropy."""
    values = {
        "data.feat_dim": config["feat_dim"],
        "data.chunk": config["chunk"],
        "genes.top_k": config["genes"],
        "genes.token_size": config["token_size"],
        "model.d": config["model_d"],
        "model.attn": config["model_attn"],
        "train.compute_dtype": compute_dtype,
    }
    if name == "student":
        weights = {f"loss.lambda_{term}": 0.0 for term in ("coral", "or", "skd", "clod")}
        values = {**values, "teachers": (), **weights}
    cfg = default_config()
    cfg.update_from_flattened_dict(values)
    return make_method(cfg, DataSpec(config["feat_dim"], 2, config["genes"] if name == "mkd" else 0))


class Trainer:
    """The library's training step, compiled for one shape, and the state it advances.

    Args:
      method: what to train.
      example: device batch that fixes the shapes.

    Attributes:
      mesh: one device.
      compile_seconds: lowering and compilation.
      temp_mib: temporaries of one step.
      argument_mib: state and batch.
    """

    def __init__(self, method: Method, example: Mapping[str, np.ndarray]):
        self.mesh = sharding.make_mesh(1)
        everywhere, (stage,) = sharding.replicated(self.mesh), method.stages
        params, extra, rng = state.init_params(method, SEED)
        tx = optim.make_optimizer(weight_decay=1e-5, decay_bias=True, trainable=stage.trainable, groups=tuple(params))
        batch = self.put(example)
        with jax.set_mesh(self.mesh):
            names = step.metric_names(method, stage.name, params, extra, batch)
            self._state = jax.device_put(state.start_stage(params, extra, rng, tx, names), everywhere)
            self._rate = jax.device_put(jnp.float32(2e-4), everywhere)
            body = step.make_train_step(method, tx, stage.name)
            jitted = jax.jit(body, donate_argnums=0, out_shardings=(everywhere, everywhere))
            began = time.perf_counter()
            self._compiled = jitted.lower(self._state, batch, self._rate).compile()
        self.compile_seconds = time.perf_counter() - began
        memory = self._compiled.memory_analysis()
        self.temp_mib = memory.temp_size_in_bytes / 2**20
        self.argument_mib = memory.argument_size_in_bytes / 2**20

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """A host batch on the device."""
        return sharding.put_batch(self.mesh, batch)

    def __call__(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """One training step; returns the loss without waiting for it."""
        self._state, loss = self._compiled(self._state, batch, self._rate)
        return loss


def window(train: Callable[[Any], Any], batches: Sequence[Any], patches: Sequence[int], steps: int) -> float:
    """Valid patches per second of `steps` steps in a row, waited for once at the end.

    Args:
      train: one training step.
      batches: resident steps, used in turn.
      patches: valid patches of each.
      steps: length of the window.
    """
    # One step outside the clock: the other side's threads come to rest and this side's buffers return.
    jax.block_until_ready(train(batches[-1]))
    result, began = None, time.perf_counter()
    for i in range(steps):
        result = train(batches[i % len(batches)])
    jax.block_until_ready(result)
    return sum(patches[i % len(patches)] for i in range(steps)) / (time.perf_counter() - began)


def jax_side(name: str, work: Workload, config: Mapping[str, Any], steps: int) -> tuple[Callable[[], float], dict]:
    """A warmed-up measurement of one JAX side, and what its compilation told."""
    method, dtype, compute = JAX_SIDES[name]
    hosts = work.batches[dtype]
    train = Trainer(build_method(method, compute, config), hosts[0])
    batches = [train.put(host) for host in hosts]
    for i in range(WARM_UP):
        jax.block_until_ready(train(batches[i % len(batches)]))
    facts = {key: getattr(train, key) for key in ("compile_seconds", "temp_mib", "argument_mib")}
    return (lambda: window(train, batches, work.patches, steps)), facts


def torch_side(name: str, work: Workload, config: Mapping[str, Any], steps: int) -> tuple[Callable[[], float], dict]:
    """A warmed-up measurement of the PyTorch loop, eager or compiled.

    Raises:
      RuntimeError: if this machine cannot compile the network; the text names the cause.
    """
    from benchmarks import torch_peer

    module = torch_peer.StudentPeer(config["feat_dim"], config["model_d"], config["model_attn"])
    train = torch_peer.make_step(module, torch_peer.compiled(module) if name == COMPILED else module)
    batches = [torch_peer.bags_of(host) for host in work.batches["float32"]]

    def measure() -> float:
        with torch_peer.all_cores():
            return window(train, batches, work.patches, steps)

    began = time.perf_counter()
    try:
        with torch_peer.all_cores():
            for i in range(WARM_UP):
                train(batches[i % len(batches)])
    except Exception as e:
        if name != COMPILED:
            raise
        raise RuntimeError(f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200]}") from e
    return measure, {"warm_up_seconds": time.perf_counter() - began}


def peer_obstacle() -> str:
    """Why the PyTorch sides cannot be measured here; empty if they can."""
    if jax.default_backend() != "cpu":
        return f"the peer runs on CPU, JAX on {jax.default_backend()}"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "PyTorch is not installed"
    return ""


def measure(config: Mapping[str, Any], median: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rates of all sides at one median bag size, measured in turn.

    Returns:
      (metrics by full name, derived facts).
    """
    work, obstacle = make_workload(config, median), peer_obstacle()
    steps = max(config["window_steps"], config["window_patches"] // int(np.mean(work.patches)))
    sides, facts, missing = {}, {}, {}
    for name in config["sides"]:
        if name not in JAX_SIDES and obstacle:
            missing[name] = obstacle
            continue
        try:
            make = jax_side if name in JAX_SIDES else torch_side
            sides[name], facts[name] = make(name, work, config, steps)
        except RuntimeError as e:
            if name != COMPILED:
                raise
            missing[name] = str(e)
    began, since = processor_seconds(), time.perf_counter()
    values = common.alternate(sides, config["repeats"])
    elsewhere = cores_used_elsewhere(began, time.perf_counter() - since)
    metrics = {f"{name}[median {median}]": common.metric(v, "valid patches/s") for name, v in values.items()}
    derived = {
        "plan": work.plan.report(),
        "resident_steps": len(work.patches),
        "fill_of_resident_steps": float(np.mean(work.patches) / work.plan.capacity),
        "valid_patches_per_step": float(np.mean(work.patches)),
        "steps_per_window": steps,
        "sides": facts,
        "not_measured": missing,
        "cores_used_elsewhere": elsewhere,
        "quiet_machine": elsewhere is not None and elsewhere <= QUIET,
    }
    ratio = compare(values, median, derived["quiet_machine"])
    if ratio:
        metrics[f"student_over_peer[median {median}]"] = common.metric(ratio.pop("ratios"), "x")
    return metrics, {**derived, **ratio}


def processor_seconds() -> tuple[float, float] | None:
    """(all processes, this process) seconds of processor time so far; None where the system does not tell."""
    path = pathlib.Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = (int(t) for t in path.read_text().split()[1:9])
    own = os.times()
    everyone = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return everyone, own.user + own.system


def cores_used_elsewhere(began: tuple[float, float] | None, seconds: float) -> float | None:
    """Cores that other processes, or other guests of the host, kept busy on average since `began`."""
    now = processor_seconds()
    if began is None or now is None:
        return None
    return max(0.0, ((now[0] - began[0]) - (now[1] - began[1])) / seconds)


def compare(values: Mapping[str, Sequence[float]], median: int, quiet: bool) -> dict[str, Any]:
    """The student against the better peer: ratio of every round, its median, and the verdict where there is a target.

    Args:
      values: side -> rate of every round.
      median: median bag size.
      quiet: whether the machine did nothing else; if it did, a target is never called met.

    Returns:
      {} if one of the two was not measured.
    """
    peers = [name for name in (EAGER, COMPILED) if name in values]
    if "student" not in values or not peers:
        return {}
    better = max(peers, key=lambda name: np.median(values[name]))
    ratios = (np.array(values["student"]) / np.array(values[better])).tolist()
    result = {"better_peer": better, "ratio": float(np.median(ratios)), "ratios": ratios}
    if median in TARGETS:
        result |= {"target": TARGETS[median], "meets_target": quiet and result["ratio"] >= TARGETS[median]}
    return result


def result_path(args: argparse.Namespace, name: str) -> pathlib.Path | None:
    """Where a result goes: --out; else, in smoke mode, a temporary folder, so that it is never taken for a result."""
    if args.out is None and args.smoke:
        return pathlib.Path(tempfile.mkdtemp()) / f"{name}.json"
    return args.out


def run(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Measures every median bag size and writes the result."""
    metrics, derived = {}, {"smoke": args.smoke}
    for median in config["medians"]:
        found, derived[f"median {median}"] = measure(config, median)
        metrics.update(found)
    settings = {**config, "compile_cache": bool(os.environ.get("JAX_COMPILATION_CACHE_DIR"))}
    notes = (
        "Compute only, optimizer included; all sides in turn in one process on the same resident bags. student: S_P "
        "alone; mkd: S_P, T_M, T_G and all loss terms. Ratio: median over rounds of student / better peer."
    )
    device = jax.devices()[0]
    return common.write_result(
        result_path(args, "bench_step"),
        benchmark="bench_step",
        config=settings,
        metrics=metrics,
        derived=derived,
        notes=notes,
        devices=(device.device_kind, 1),
    )


def main() -> None:
    """Command line."""
    arguments = common.parser("bench_step", __doc__.splitlines()[0])
    arguments.add_argument("--medians", type=int, nargs="+", help="median bag sizes, e.g. 100 1000 10000")
    arguments.add_argument("--sides", nargs="+", choices=SIDES, help="what to measure")
    arguments.add_argument("--chunk", type=int, help="patches per chunk of the attention pool")
    arguments.add_argument("--repeats", type=int, help="rounds")
    args = arguments.parse_args()
    config = dict(SMOKE if args.smoke else FULL)
    config |= {k: v for k in ("medians", "sides", "chunk", "repeats") if (v := getattr(args, k)) is not None}
    run(config, args)


if __name__ == "__main__":
    main()
