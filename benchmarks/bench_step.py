"""Training speed without input: packed JAX steps of the student S_P and of full MKD against a PyTorch bag loop.

All sides train on the same resident bags (log-normal sizes, b per step), include the optimizer, and take turns in one
process. The peer is the better of PyTorch eager and compiled, on all cores, or on the GPU with its bags in GPU memory
where JAX runs on one. float32 is compared with float32, bfloat16 with bfloat16 (autocast, as users do). Only the
student is compared: it is what the peer computes. Valid patches count, padding does not. Measure on a quiet machine:
under contention the ratio means nothing.

    python -m benchmarks.bench_step [--smoke] [--medians 100 1000 10000 50000] [--sides student ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
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

from benchmarks import common, flops, peaks
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
# Wanted ratio of the student to the better peer by median bag size: float32 on CPU, bfloat16 on both sides on a GPU.
TARGETS = {100: 2.0, 1000: 1.5}
GPU_TARGETS = {1000: 50.0, 10_000: 10.0}
GPU_MFU_TARGET = 0.4
# side -> (method, dtype of the patches, compute dtype)
JAX_SIDES = {
    "student": ("student", "float32", "float32"),
    "student_float16_input": ("student", "float16", "float32"),
    "student_bfloat16": ("student", "float16", "bfloat16"),
    "student_bfloat16_input": ("student", "bfloat16", "bfloat16"),
    "mkd": ("mkd", "float32", "float32"),
    "mkd_float16_input": ("mkd", "float16", "float32"),
    "mkd_bfloat16": ("mkd", "float16", "bfloat16"),
    "mkd_bfloat16_input": ("mkd", "bfloat16", "bfloat16"),
}
EAGER, COMPILED = "torch_eager", "torch_compiled"
# side -> whether its products are bfloat16
TORCH_SIDES = {EAGER: False, COMPILED: False, f"{EAGER}_bfloat16": True, f"{COMPILED}_bfloat16": True}
SIDES = (*JAX_SIDES, *TORCH_SIDES)
# compute dtype -> (sides of the student, peers): what is compared with what
RIVALS = {
    "float32": (("student",), (EAGER, COMPILED)),
    "bfloat16": (("student_bfloat16", "student_bfloat16_input"), (f"{EAGER}_bfloat16", f"{COMPILED}_bfloat16")),
}
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
FULL = {
    "feat_dim": 1024, "genes": 8192, "token_size": 512, "model_d": 256, "model_attn": 128, "slides": 320, "sigma": 0.8,
    "largest_bag": 120_000, "slides_per_step": 16, "medians": [100, 1000], "chunk": 512, "row_multiple": 128,
    "resident_patches": 120_000, "resident_gb": 6.0, "window_seconds": 3.0, "window_seconds_max": 12.0,
    "window_steps": 20, "repeats": 7,
    "sides": [
        "student", "student_float16_input", "student_bfloat16", "mkd", EAGER, COMPILED, f"{EAGER}_bfloat16",
        f"{COMPILED}_bfloat16",
    ],
}  # fmt: skip
SMOKE = {
    "feat_dim": 32, "genes": 64, "token_size": 32, "model_d": 16, "model_attn": 8, "slides": 12, "sigma": 0.8,
    "largest_bag": 1000, "slides_per_step": 4, "medians": [20], "chunk": 64, "row_multiple": 32,
    "resident_patches": 200, "resident_gb": 1.0, "window_seconds": 0.02, "window_seconds_max": 0.5, "window_steps": 2,
    "repeats": 2, "sides": ["student", "student_bfloat16", "mkd", EAGER, f"{EAGER}_bfloat16"],
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


def bytes_per_patch(config: Mapping[str, Any]) -> int:
    """Bytes that one resident patch takes: a host and a device copy for every dtype in use."""
    copies = [2 * ITEMSIZE[dtype] for dtype in _patch_dtypes(config)]
    copies += [2] * any(TORCH_SIDES.get(side, False) for side in config["sides"])
    return config["feat_dim"] * sum(copies)


def _patch_dtypes(config: Mapping[str, Any]) -> list[str]:
    return sorted({"float32", *(JAX_SIDES[side][1] for side in config["sides"] if side in JAX_SIDES)})


def fitting_plan(config: Mapping[str, Any], median: int) -> tuple[PackPlan, int]:
    """The plan of one median bag size and how many of its steps are resident.

    Large bags are planned with fewer slides per step (the student's loss does not couple them) until one step fits.

    Args:
      config: with `resident_gb` (10^9 bytes) for the bags of all sides together.
      median: median bag size.

    Raises:
      ValueError: if not even two slides per step fit.
    """
    sizes = common.log_normal_sizes(config["slides"], median, config["sigma"], SEED)
    sizes = np.minimum(sizes, config["largest_bag"])
    room, slides = int(config["resident_gb"] * 1e9 / bytes_per_patch(config)), config["slides_per_step"]
    while slides >= 2:
        plan = make_plan(sizes, {**config, "slides_per_step": slides})
        if plan.capacity <= room:
            wanted = max(1, min(config["resident_patches"], room) // plan.capacity)
            return plan, min(wanted, plan.steps_per_epoch)
        slides //= 2
    raise ValueError(
        f"median {median}: a step of 2 slides has up to {plan.capacity:,} patches, but resident_gb = "
        f"{config['resident_gb']} holds {room:,}: raise --resident-gb or give fewer --sides"
    )


def make_workload(config: Mapping[str, Any], median: int) -> Workload:
    """Plans steps of log-normal bags and builds the first of them in memory, as the input pipeline would."""
    plan, count = fitting_plan(config, median)
    table = SlideTable(np.arange(len(plan.sizes)), slot_fields(len(plan.sizes), config["genes"]))
    batches = {}
    for dtype in _patch_dtypes(config):
        read_as = "float32" if dtype == "bfloat16" else dtype  # the disk format knows no bfloat16
        reader = NoiseReader(plan.sizes, config["feat_dim"])
        assemble = BatchAssembler(StepSource(reader, table, plan, read_as), slice(0, 1))
        batches[dtype] = [_cast(assemble(plan.step(0, i)), dtype) for i in range(count)]
    return Workload(plan, batches, tuple(int(plan.step(0, i).count.sum()) for i in range(count)))


def _cast(batch: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    return batch if dtype != "bfloat16" else {**batch, "patches": batch["patches"].astype(jnp.bfloat16)}


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
      example: host batch that fixes the shapes.
      mesh: where to train; default: one device.
      stage: name of the stage to train; default: the only one.

    Attributes:
      mesh: the mesh.
      compile_seconds: lowering and compilation.
      temp_mib: temporaries of one step.
      argument_mib: state and batch.
    """

    def __init__(
        self,
        method: Method,
        example: Mapping[str, np.ndarray],
        mesh: jax.sharding.Mesh | None = None,
        stage: str | None = None,
    ):
        self.mesh = sharding.make_mesh(1) if mesh is None else mesh
        (stage,) = (s for s in method.stages if stage in (None, s.name))
        everywhere = sharding.replicated(self.mesh)
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

    @property
    def state(self) -> state.TrainState:
        """The present state; the next step donates it."""
        return self._state

    def compiled_text(self) -> str:
        """The optimised program of a step, as text."""
        return self._compiled.as_text()

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """A host batch on the device."""
        return sharding.put_batch(self.mesh, batch)

    def __call__(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """One training step; returns the loss without waiting for it."""
        self._state, loss = self._compiled(self._state, batch, self._rate)
        return loss


def window(
    train: Callable[[Any], Any],
    batches: Sequence[Any],
    patches: Sequence[int],
    steps: int,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> float:
    """Valid patches per second of `steps` steps in a row, waited for once at the end.

    Args:
      train: one training step.
      batches: resident steps, used in turn.
      patches: valid patches of each.
      steps: length of the window.
      wait: returns when the result of a step is there.
    """
    # One step outside the clock: the other side's threads come to rest and this side's buffers return.
    wait(train(batches[-1]))
    result, began = None, time.perf_counter()
    for i in range(steps):
        result = train(batches[i % len(batches)])
    wait(result)
    return sum(patches[i % len(patches)] for i in range(steps)) / (time.perf_counter() - began)


def window_steps(config: Mapping[str, Any], step_seconds: float) -> int:
    """Steps of a window: at least `window_steps` and `window_seconds`, but at most `window_seconds_max` long."""
    wanted = max(config["window_steps"], math.ceil(config["window_seconds"] / step_seconds))
    return max(1, min(wanted, int(config["window_seconds_max"] / step_seconds)))


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """One warmed-up contestant.

    Attributes:
      measure: runs one window; valid patches/s.
      facts: what making it told.
    """

    measure: Callable[[], float]
    facts: Mapping[str, Any]


def _warmed_up(train, batches, work: Workload, config: Mapping[str, Any], wait, facts: Mapping[str, Any]) -> Side:
    seconds = []
    for i in range(WARM_UP):
        began = time.perf_counter()
        wait(train(batches[i % len(batches)]))
        seconds.append(time.perf_counter() - began)
    steps = window_steps(config, min(seconds))
    measure = functools.partial(window, train, batches, work.patches, steps, wait)
    return Side(measure, {**facts, "steps_per_window": steps})


def jax_side(name: str, work: Workload, config: Mapping[str, Any], on_device: dict[str, list]) -> Side:
    """One JAX side.

    Args:
      name: key of `JAX_SIDES`.
      work: the resident steps.
      config: sizes.
      on_device: patch dtype -> device batches; filled on first use, so that sides of one dtype share them.
    """
    method, dtype, compute = JAX_SIDES[name]
    train = Trainer(build_method(method, compute, config), work.batches[dtype][0])
    if dtype not in on_device:
        on_device[dtype] = [train.put(host) for host in work.batches[dtype]]
    facts = {key: getattr(train, key) for key in ("compile_seconds", "temp_mib", "argument_mib")}
    return _warmed_up(train, on_device[dtype], work, config, jax.block_until_ready, facts)


def torch_side(name: str, work: Workload, config: Mapping[str, Any]) -> Side:
    """One PyTorch side, on the kind of device that JAX uses, its bags in that device's memory.

    Raises:
      RuntimeError: if this machine cannot compile the network; the text names the cause.
    """
    from benchmarks import torch_peer

    device, low = torch_peer.device_for(jax.default_backend()), TORCH_SIDES[name]
    compile_it = name.startswith(COMPILED)
    module = torch_peer.StudentPeer(config["feat_dim"], config["model_d"], config["model_attn"]).to(device)
    network = torch_peer.compiled(module) if compile_it else module
    train = torch_peer.make_step(module, network, bfloat16=low)
    batches = [torch_peer.bags_of(host, device, bfloat16=low) for host in work.batches["float32"]]
    began = time.perf_counter()
    try:
        with torch_peer.all_cores():
            train(batches[0])
            warm_up = time.perf_counter() - began
            facts = {"first_step_seconds": warm_up, "device": device.type}
            side = _warmed_up(train, batches, work, config, torch_peer.wait, facts)
    except Exception as e:
        if not compile_it:
            raise
        raise RuntimeError(f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200]}") from e

    def measure() -> float:
        with torch_peer.all_cores():
            return side.measure()

    return Side(measure, side.facts)


def peer_obstacle() -> str:
    """Why the PyTorch sides cannot be measured here; empty if they can."""
    try:
        from benchmarks import torch_peer
    except ImportError:
        return "PyTorch is not installed"
    try:
        torch_peer.device_for(jax.default_backend())
    except ValueError as e:
        return str(e)
    return ""


def make_sides(
    work: Workload, config: Mapping[str, Any]
) -> tuple[dict[str, Callable[[], float]], dict[str, Mapping[str, Any]], dict[str, str]]:
    """All contestants of one workload.

    Returns:
      (measurements, facts, reasons of what cannot be measured), each by side.
    """
    sides, facts, missing, on_device, obstacle = {}, {}, {}, {}, peer_obstacle()
    for name in config["sides"]:
        if name in TORCH_SIDES and obstacle:
            missing[name] = obstacle
            continue
        try:
            side = jax_side(name, work, config, on_device) if name in JAX_SIDES else torch_side(name, work, config)
        except RuntimeError as e:
            if not name.startswith(COMPILED):
                raise
            missing[name] = str(e)
            continue
        sides[name], facts[name] = side.measure, side.facts
    return sides, facts, missing


def measure(config: Mapping[str, Any], median: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rates of all sides at one median bag size, measured in turn.

    Returns:
      (metrics by full name, derived facts).
    """
    work = make_workload(config, median)
    sides, facts, missing = make_sides(work, config)
    began, since = processor_seconds(), time.perf_counter()
    values = common.alternate(sides, config["repeats"])
    elsewhere = cores_used_elsewhere(began, time.perf_counter() - since)
    quiet = elsewhere is not None and elsewhere <= QUIET
    metrics = {f"{name}[median {median}]": common.metric(v, "valid patches/s") for name, v in values.items()}
    derived = {
        "plan": work.plan.report(),
        "resident_steps": len(work.patches),
        "fill_of_resident_steps": float(np.mean(work.patches) / work.plan.capacity),
        "valid_patches_per_step": float(np.mean(work.patches)),
        "sides": facts,
        "not_measured": missing,
        "cores_used_elsewhere": elsewhere,
        "quiet_machine": quiet,
        "utilisation": {},
    }
    for name in (side for side in values if side in JAX_SIDES):
        more, used = utilisation(name, values[name], work, config, jax.devices()[0])
        metrics.update({f"{name}_{key}[median {median}]": value for key, value in more.items()})
        derived["utilisation"][name] = used
    on_gpu = jax.default_backend() == "gpu"
    for dtype, targets in (("float32", {} if on_gpu else TARGETS), ("bfloat16", GPU_TARGETS if on_gpu else {})):
        found = compare(values, median, quiet, dtype, targets)
        if found:
            prefix = "student_over_peer" if dtype == "float32" else f"student_over_peer_{dtype}"
            metrics[f"{prefix}[median {median}]"] = common.metric(found.pop("ratios"), "x")
            derived[f"comparison_{dtype}"] = found
    return metrics, derived


def utilisation(
    side: str, rates: Sequence[float], work: Workload, config: Mapping[str, Any], device: jax.Device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How well a side uses its device: analytic FLOPs and least bytes of valid patches against the peaks.

    Args:
      side: key of `JAX_SIDES`.
      rates: valid patches/s of every round.
      work: the resident steps.
      config: sizes.
      device: where it ran.

    Returns:
      (metrics "tflops" and, off CPU, "mfu" and "hbm"; facts: FLOPs per step, the peaks, or why they are left out).

    Raises:
      peaks.UnknownDeviceError: on an accelerator without an entry.
    """
    method, dtype, compute = JAX_SIDES[side]
    widths, patches, slides = flops.Widths.of(config), float(np.mean(work.patches)), work.plan.num_slots
    work_per_step = flops.step_flops(widths, method, patches, slides)
    moved = flops.step_bytes(widths, method, patches, slides, ITEMSIZE[dtype])
    steps_per_s = np.asarray(rates) / patches
    metrics = {"tflops": common.metric((steps_per_s * work_per_step / 1e12).tolist(), "TFLOP/s")}
    facts: dict[str, Any] = {"flops_per_step": work_per_step, "least_bytes_per_step": moved}
    if device.platform == "cpu":
        return metrics, {**facts, "mfu": peaks.CPU_REASON}
    peak = peaks.lookup(device.device_kind)
    ceiling = peak.product_tflops(compute) * 1e12
    metrics["mfu"] = common.metric((steps_per_s * work_per_step / ceiling).tolist(), "of peak")
    metrics["hbm"] = common.metric((steps_per_s * moved / 1e9).tolist(), "GB/s")
    facts |= {"peak_tflops": ceiling / 1e12, "peak_hbm_gb_s": peak.hbm_gb_s, "mfu_target": GPU_MFU_TARGET}
    facts["meets_mfu_target"] = metrics["mfu"]["median"] >= GPU_MFU_TARGET
    return metrics, facts


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


def compare(
    values: Mapping[str, Sequence[float]], median: int, quiet: bool, dtype: str, targets: Mapping[int, float]
) -> dict[str, Any]:
    """The better student against the better peer of one dtype: ratio of every round, its median, and the verdict.

    Args:
      values: side -> rate of every round.
      median: median bag size.
      quiet: whether the machine did nothing else; if it did, a target is never called met.
      dtype: key of `RIVALS`.
      targets: wanted ratio by median bag size.

    Returns:
      {} if one of the two was not measured.
    """
    students, peers = ([name for name in names if name in values] for names in RIVALS[dtype])
    if not students or not peers:
        return {}
    student, peer = (max(names, key=lambda name: np.median(values[name])) for names in (students, peers))
    ratios = (np.array(values[student]) / np.array(values[peer])).tolist()
    result = {"student": student, "better_peer": peer, "ratio": float(np.median(ratios)), "ratios": ratios}
    if median in targets:
        result |= {"target": targets[median], "meets_target": quiet and result["ratio"] >= targets[median]}
    return result


def result_path(args: argparse.Namespace, name: str) -> pathlib.Path | None:
    """Where a result goes: --out; else, in smoke mode, a temporary folder, so that it is never taken for a result."""
    if args.out is None and args.smoke:
        return pathlib.Path(tempfile.mkdtemp()) / f"{name}.json"
    return args.out


def run(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Measures every median bag size and writes the result.

    Raises:
      peaks.UnknownDeviceError: before anything is measured, on an accelerator without an entry.
    """
    if jax.default_backend() != "cpu":
        peaks.lookup(jax.devices()[0].device_kind)
    metrics, derived = {}, {"smoke": args.smoke}
    for median in config["medians"]:
        found, derived[f"median {median}"] = measure(config, median)
        metrics.update(found)
    settings = {**config, "compile_cache": bool(os.environ.get("JAX_COMPILATION_CACHE_DIR"))}
    notes = (
        "Compute only, optimizer included; all sides in turn in one process on the same resident bags. student: S_P "
        "alone; mkd: S_P, T_M, T_G and all loss terms. Ratio: median over rounds of student / better peer of the same "
        "dtype. Large bags: fewer slides per step (see plan), so that the resident steps fit in memory."
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
    arguments.add_argument("--slides-per-step", type=int, help="b, for all sides")
    arguments.add_argument("--resident-gb", type=float, help="10^9 bytes for the resident bags of all sides")
    arguments.add_argument("--resident-patches", type=int, help="patches of the resident steps, at least one step")
    arguments.add_argument("--repeats", type=int, help="rounds")
    args = arguments.parse_args()
    config = dict(SMOKE if args.smoke else FULL)
    given = ("medians", "sides", "chunk", "slides_per_step", "resident_gb", "resident_patches", "repeats")
    config |= {k: v for k in given if (v := getattr(args, k)) is not None}
    run(config, args)


if __name__ == "__main__":
    main()
