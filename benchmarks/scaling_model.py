"""Scaling on paper: step time and weak-scaling efficiency of MKD on 8, 64 and 1,024 accelerators.

One step of one accelerator with P valid patches and b slides takes

    t_compute = FLOPs / (peak x efficiency)          analytic FLOPs, plus what dividing adds: the pool's one-hot product
                                                     with all S slots of the step (4 H S per patch and pass), and S x S
                                                     Gram matrices of the batch-coupled losses
    t_memory  = least bytes / (HBM x efficiency)
    t_feed    = bytes of the patches / PCIe          streaming; 0 for a cohort in device memory
    t_comm    = ring all-reduce of the program's collective bytes, inside a link domain, then between domains
    t_step    = max(t_compute, t_memory, t_feed) + t_comm      (no overlap of communication is assumed)

Collective bytes are read from compiled programs at two numbers of slots, which gives bytes = fixed + per_slot x S;
both are independent of bag lengths. Weak scaling keeps P and b per accelerator; efficiency = t_step(1) / t_step(n).
Two layouts: "one training" divides one training over all n accelerators; "replicas" runs n / 8 trainings (folds x
seeds) of 8 accelerators each, between which nothing travels. Whatever was not measured on accelerators is marked
"unchecked".

    python -m benchmarks.scaling_model [--device "NVIDIA H200"] [--smoke] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks import common, flops, peaks, report

COUNTS = (8, 64, 1024)
COHORTS = {"TCGA": 11_000, "million": 1_000_000}
NETWORKS = 3
GROUP = 8
HBM_SHARE = 0.8
"""Part of device memory that a resident cohort may take."""
CONFIG = {
    "feat_dim": 1024, "genes": 8192, "token_size": 512, "model_d": 256, "model_attn": 128, "method": "mkd",
    "chunk": 128, "compute_dtype": "float32", "slides_per_step": 16, "patches_per_slide": 10_000,
}  # fmt: skip
SMOKE = {
    "feat_dim": 32, "genes": 64, "token_size": 32, "model_d": 16, "model_attn": 8, "method": "student", "chunk": 16,
    "compute_dtype": "float32", "slides_per_step": 4, "patches_per_slide": 10_000,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What no datasheet and no compiled program tells.

    Attributes:
      compute_efficiency: reached share of the matrix peak.
      memory_efficiency: reached share of the memory peak.
      pcie_efficiency: reached share of the host link.
      link_efficiency: reached share of links between accelerators.
      network_gb_s: between link domains, per accelerator and direction.
      pcie_gb_s: host link where the datasheet gives none.
      latency_us: per step of a ring.
      local_slots: if true, the pool compares a patch with the slots of its own accelerator only (not yet implemented).
    """

    compute_efficiency: float = 0.4
    memory_efficiency: float = 0.85
    pcie_efficiency: float = 0.8
    link_efficiency: float = 0.7
    network_gb_s: float = 50.0
    pcie_gb_s: float = 16.0
    latency_us: float = 3.0
    local_slots: bool = False


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collective bytes of a step as a function of its slots: `fixed + per_slot * S`."""

    fixed: float
    per_slot: float

    def bytes(self, slots: float) -> float:
        """Bytes of one step with S slots."""
        return self.fixed + self.per_slot * slots


def fit_traffic(points: Mapping[int, float]) -> Traffic:
    """The line through two measured points.

    Args:
      points: slots -> bytes, exactly two.

    Raises:
      ValueError: if there are not two, or bytes fall with slots.
    """
    if len(points) != 2:
        raise ValueError(f"{len(points)} points given; the traffic is a line through exactly two")
    (s0, b0), (s1, b1) = sorted(points.items())
    slope = (b1 - b0) / (s1 - s0)
    if slope < 0:
        raise ValueError(f"collective bytes fall from {b0} at {s0} slots to {b1} at {s1}: not a program of one method")
    return Traffic(b0 - slope * s0, slope)


def all_reduce_seconds(size: float, devices: int, peak: peaks.Peak, assume: Assumptions) -> float:
    """Ring all-reduce inside a link domain, then, over as many rings as accelerators, between domains.

    Args:
      size: bytes on every accelerator.
      devices: accelerators that take part.
      peak: links of the accelerator.
      assume: efficiencies and latencies.
    """
    if devices <= 1 or size <= 0:
        return 0.0
    inside = min(devices, peak.link_domain)
    domains = math.ceil(devices / peak.link_domain)
    latency = assume.latency_us * 1e-6
    seconds = 2 * (inside - 1) / inside * size / (peak.link_gb_s * 1e9 * assume.link_efficiency)
    seconds += 2 * (inside - 1) * latency
    if domains > 1:
        share = size / inside
        seconds += 2 * (domains - 1) / domains * share / (assume.network_gb_s * 1e9 * assume.link_efficiency)
        # Latency of a tree: a ring over many domains would not be used.
        seconds += 2 * math.ceil(math.log2(domains)) * latency
    return seconds


@dataclasses.dataclass(frozen=True)
class Step:
    """Predicted seconds of one step."""

    compute: float
    memory: float
    feed: float
    communication: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return max(self.compute, self.memory, self.feed) + self.communication

    @property
    def limit(self) -> str:
        """The largest part."""
        parts = dataclasses.asdict(self)
        return max(parts, key=parts.get)


def predict(
    widths: flops.Widths,
    method: str,
    peak: peaks.Peak,
    traffic: Traffic,
    *,
    devices: int,
    slides: int,
    patches: float,
    resident: bool,
    assume: Assumptions,
) -> Step:
    """One step of a training that is divided over `devices` accelerators, in bfloat16.

    Args:
      widths: of the model.
      method: "student" or "mkd".
      peak: of the accelerator.
      traffic: collective bytes.
      devices: accelerators of this training.
      slides: b, slides per accelerator and step.
      patches: valid patches per accelerator and step.
      resident: whether the cohort lies in device memory.
      assume: the rest.
    """
    slots = slides * devices
    seen = slides if assume.local_slots else slots
    networks = {flops.STUDENT: 1, flops.MKD: 2}[method]
    arithmetic = flops.step_flops(widths, method, patches, slides)
    # The one-hot products beyond what one slot per patch needs, which the analytic count already holds.
    arithmetic += networks * patches * flops.INNER * 2 * widths.width * (seen - 1)
    if method == flops.MKD:
        arithmetic += NETWORKS * flops.INNER * 2 * slots**2 * widths.width
    moved = flops.step_bytes(widths, method, patches, slides, 2)
    pcie = (peak.pcie_gb_s or assume.pcie_gb_s) * 1e9 * assume.pcie_efficiency
    return Step(
        compute=arithmetic / (peak.bf16_tflops * 1e12 * assume.compute_efficiency),
        memory=moved / (peak.hbm_gb_s * 1e9 * assume.memory_efficiency),
        feed=0.0 if resident else patches * widths.feat_dim * 2 / pcie,
        communication=all_reduce_seconds(traffic.bytes(slots), devices, peak, assume),
    )


def fits(slides: int, patches_per_slide: float, feat_dim: int, devices: int, peak: peaks.Peak) -> bool:
    """Whether a cohort in 16-bit numbers, divided over the devices of one training, fits in their memory."""
    return slides * patches_per_slide * feat_dim * 2 / devices <= HBM_SHARE * peak.hbm_gb * 1e9


def table(
    widths: flops.Widths, config: Mapping[str, Any], peak: peaks.Peak, traffic: Traffic, assume: Assumptions
) -> list[dict[str, Any]]:
    """One row per cohort, number of accelerators and layout."""
    b, per_slide, method = config["slides_per_step"], config["patches_per_slide"], config["method"]
    fixed = dict(slides=b, patches=b * per_slide, assume=assume)
    rows = []
    for cohort, slides in COHORTS.items():
        for count in COUNTS:
            for layout, divided in (("one training", count), ("replicas", min(GROUP, count))):
                if layout == "replicas" and divided == count:
                    continue
                resident = fits(slides, per_slide, widths.feat_dim, divided, peak)
                alone = predict(widths, method, peak, traffic, devices=1, resident=resident, **fixed)
                step = predict(widths, method, peak, traffic, devices=divided, resident=resident, **fixed)
                together = b * divided
                rows.append(
                    {
                        "cohort": cohort,
                        "accelerators": count,
                        "layout": layout,
                        "trainings": count // divided,
                        "slides_per_step": together,
                        "resident": resident,
                        "step_ms": step.total * 1e3,
                        "communication_ms": step.communication * 1e3,
                        "limit": step.limit,
                        "weak_scaling_efficiency": alone.total / step.total,
                        "patches_per_s": step_rate(b * per_slide, count, step),
                        "epoch_s": math.ceil(slides / together) * step.total,
                        # Losses over more slides than the cohort has, or than a user wants in a step, are no training.
                        "usable": together <= slides,
                        "checked": "unchecked",
                    }
                )
    return rows


def step_rate(patches: float, accelerators: int, step: Step) -> float:
    """Valid patches/s of all accelerators together."""
    return patches * accelerators / step.total


def compiled_points(config: Mapping[str, Any], devices: int = GROUP) -> dict[int, float]:
    """slots -> collective bytes of the program compiled for `devices` simulated devices, at b and 2 b slides.

    Raises:
      RuntimeError: if the compiling process fails.
    """
    code = (
        "import jax, json, sys; settings, devices = json.loads(sys.argv[1]), int(sys.argv[2])\n"
        "jax.config.update('jax_platforms', 'cpu'); jax.config.update('jax_num_cpu_devices', devices)\n"
        "from benchmarks import bench_collectives as b\n"
        "found = {}\n"
        "for slides in (settings['slides_per_step'], 2 * settings['slides_per_step']):\n"
        "    train, _ = b.trainer({**settings, 'slides_per_step': slides}, devices, slides * devices * 16)\n"
        "    found[slides] = sum(b.collective_bytes(train.compiled_text()).values())\n"
        "print(json.dumps(found))"
    )
    command = [sys.executable, "-c", code, json.dumps(dict(config)), str(devices)]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling for {devices} devices failed:\n{done.stderr[-3000:]}")
    return {int(slots): size for slots, size in json.loads(done.stdout.splitlines()[-1]).items()}


def check(
    records: Iterable[Mapping[str, Any]], widths: flops.Widths, peak: peaks.Peak, assume: Assumptions
) -> dict[str, Any]:
    """Prediction against the measured steps of `bench_step` on the same kind of accelerator.

    Args:
      records: results, any benchmarks.
      widths: of the model.
      peak: of the accelerator.
      assume: efficiencies.

    Returns:
      {"status": "unchecked", ...} without such a result; else measured and predicted patches/s of one accelerator.
    """
    points = {}
    for record in records:
        known = peaks.PEAKS.get(record["device_kind"])
        if record["benchmark"] != "bench_step" or known != peak or flops.Widths.of(record["config"]) != widths:
            continue
        for name, found in record["metrics"].items():
            for method in flops.METHODS:
                if name.startswith(f"{method}_bfloat16_input["):
                    median = name[name.index("[") + 1 : -1]
                    facts = record["derived"][median]
                    patches, slides = facts["valid_patches_per_step"], facts["plan"]["slots"]
                    step = predict(
                        widths,
                        method,
                        peak,
                        Traffic(0, 0),
                        **dict(devices=1, slides=slides, patches=patches, resident=True, assume=assume),
                    )
                    predicted = patches / step.total
                    points[f"{method}, {median}"] = {
                        "measured": found["median"],
                        "predicted": predicted,
                        "measured_over_predicted": found["median"] / predicted,
                    }
    if not points:
        return {"status": "unchecked", "reason": f"no bench_step result on {peak.name} with these widths"}
    status = "one accelerator checked; communication and the host link unchecked"
    return {"status": status, "patches_per_s": points}


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    header = (
        "cohort", "accelerators", "layout", "slides / step", "cohort in memory", "step, ms", "of it communication",
        "limit", "weak-scaling efficiency", "epoch, s", "checked",
    )  # fmt: skip
    lines = []
    for row in rows:
        layout = row["layout"] if row["trainings"] == 1 else f"{row['trainings']} {row['layout']}"
        numbers = [f"{row['step_ms']:.2f}", f"{row['communication_ms']:.2f}", row["limit"]]
        numbers += [f"{row['weak_scaling_efficiency']:.2f}", f"{row['epoch_s']:.2f}"]
        if not row["usable"]:
            numbers = ["-", "-", "a step would hold more slides than the cohort", "-", "-"]
        slides = f"{row['slides_per_step']:,}"
        resident = "yes" if row["resident"] else "no: streamed"
        count = f"{row['accelerators']:,}"
        lines.append((row["cohort"], count, layout, slides, resident, *numbers, row["checked"]))
    return report.table(header, lines)


def run(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Predicts, prints the table and writes the result."""
    peak, widths = peaks.lookup(args.device), flops.Widths.of(config)
    points = compiled_points(config)
    traffic = fit_traffic(points)
    variants = {"as implemented": Assumptions(), "pool compares own slots only": Assumptions(local_slots=True)}
    results = args.results if args.results is not None else common.RESULTS
    records = report.load_results(results) if any(results.glob("*.json")) else []
    rows = {name: table(widths, config, peak, traffic, assume) for name, assume in variants.items()}
    metrics = {}
    for row in rows["as implemented"]:
        if row["usable"]:
            name = f"{row['cohort']}, {row['accelerators']} accelerators, {row['layout']}"
            metrics[f"step[{name}]"] = common.metric([row["step_ms"]], "ms (predicted)")
            metrics[f"efficiency[{name}]"] = common.metric([row["weak_scaling_efficiency"]], "predicted")
    record = common.write_result(
        _target(args),
        benchmark="scaling_model",
        config={**config, "device": peak.name, "assumptions": dataclasses.asdict(Assumptions())},
        metrics=metrics,
        derived={
            "smoke": args.smoke,
            "check": check(records, widths, peak, Assumptions()),
            "collective_bytes": {str(slots): size for slots, size in points.items()},
            "traffic": dataclasses.asdict(traffic),
            "rows": rows,
        },
        notes="Predictions, not measurements: see the module text for the model. Bytes from compiled programs.",
        devices=(f"{peak.name}, predicted", 0),
    )
    for name, found in rows.items():
        print(f"\n{peak.name}, {name}:\n\n{markdown(found)}")
    return record


def _target(args: argparse.Namespace) -> pathlib.Path | None:
    if args.out is None and args.smoke:
        import tempfile

        return pathlib.Path(tempfile.mkdtemp()) / "scaling_model.json"
    return args.out


def main() -> None:
    """Command line."""
    arguments = common.parser("scaling_model", __doc__.splitlines()[0])
    arguments.add_argument("--device", default="NVIDIA H200", help="device kind, as JAX names it (benchmarks/peaks.py)")
    arguments.add_argument("--results", type=pathlib.Path, help="folder of results to check against")
    args = arguments.parse_args()
    run(dict(SMOKE if args.smoke else CONFIG), args)


if __name__ == "__main__":
    main()
