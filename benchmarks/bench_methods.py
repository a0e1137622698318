"""Seconds of a training step of every slide-level method, at bags of 10,000 and 50,000 patches.

One step holds b equal bags of noise in memory, the published widths, float32, optimizer included; compilation is
outside the clock, and the methods run one after the other. Rates count patches. Networks whose attention couples all
patches of a bag (TransMIL) and those that keep activations (segment pooling) also show in the temporaries.

    python -m benchmarks.bench_methods [--smoke] [--methods abmil ghanet ...] [--patches 10000 50000] [--out FILE]
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from benchmarks import bench_step, common
from data_pipelines import schema
from histokd_jax.methods import registry
from histokd_jax.types import CLASSIFICATION, SURVIVAL, DataSpec
from histokd_jax.utils import config as config_utils

_SUPERVISED = (
    "snn", "deepsets", "abmil", "deepattnmisl", "clam_sb", "clam_mb", "dsmil", "transmil", "mcat", "porpoise_mmf",
    "survpath",
)  # fmt: skip
# name -> configuration
METHODS = {
    "mkd": "configs/mkd.py:er",
    "ghanet": "configs/ghanet.py:corrected",
    **{name: f"configs/supervised.py:{name}" for name in _SUPERVISED},
    "survival_kd": "configs/survival_kd.py:abmil,porpoise_mmf",
}
# Functional gene groups: six, as MCAT and G-HANet form them.
GROUPS = 6
BINS = 4
FULL = {
    "feat_dim": 1024, "genes": 6144, "slides_per_step": 2, "patches": [10_000, 50_000], "repeats": 5,
    "methods": list(METHODS), "overrides": [],
}  # fmt: skip
SMOKE = {
    "feat_dim": 16, "genes": 24, "slides_per_step": 2, "patches": [100], "repeats": 2, "methods": ["abmil", "mcat"],
    "overrides": ["model.abmil.width=8", "model.abmil.attn=4", "model.abmil.rho=8", "model.mcat.width=8"],
}  # fmt: skip


def build(name: str, config: Mapping[str, Any]) -> Any:
    """The method called `name` at its published widths."""
    cfg = config_utils.load(METHODS[name], [f"data.feat_dim={config['feat_dim']}", *config["overrides"]])
    genes = config["genes"]
    if name == "mkd":
        cfg.unlock()
        cfg.genes.top_k, cfg.genes.token_size = genes, genes // 2
        spec = DataSpec(config["feat_dim"], 2, genes, CLASSIFICATION)
    else:
        grouped = name == "ghanet" or cfg.get("genes", {}).get("kind") == "groups"
        groups = (genes // GROUPS,) * GROUPS if grouped else ()
        spec = DataSpec(config["feat_dim"], BINS, genes, SURVIVAL, groups)
    return registry.get_method(cfg.method)(cfg, spec)


def make_batch(config: Mapping[str, Any], patches: int, chunk: int = 512) -> dict[str, np.ndarray]:
    """One row of b equal bags with every field that a method may ask for; padded to whole chunks.

    Args:
      config: widths and slides per step b.
      patches: patches per bag.
      chunk: the row is a multiple of it.
    """
    slides, genes = config["slides_per_step"], config["genes"]
    rng, used = np.random.default_rng(bench_step.SEED), slides * patches
    length = -(-used // chunk) * chunk
    ids, positions = np.zeros((2, 1, length), np.int32)
    ids[0, :used], positions[0, :used] = np.divmod(np.arange(used), patches)
    ids[0, :used] += 1
    each = np.arange(slides)
    return {
        schema.PATCHES: rng.standard_normal((1, length, config["feat_dim"]), np.float32),
        schema.SEGMENT_IDS: ids,
        schema.POSITIONS: positions,
        schema.CLUSTERS: rng.integers(0, 10, (1, length)).astype(np.int32),
        schema.WEIGHT: np.ones(slides, np.float32),
        schema.SLIDE_INDEX: each.astype(np.int32),
        schema.LABEL: (each % 2).astype(np.int32),
        schema.TIME: (12.0 * (each + 1)).astype(np.float32),
        schema.EVENT: np.ones(slides, np.float32),
        schema.GENES: rng.standard_normal((slides, genes), np.float32),
        schema.HAS_GENES: np.ones(slides, bool),
    }


def measure(config: Mapping[str, Any], patches: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics by full name, facts by method) of all methods at one bag size."""
    batch, metrics, facts = make_batch(config, patches), {}, {}
    on_device = None
    for name in tqdm(config["methods"], desc=f"{patches:,} patches per bag", unit="method"):
        method = build(name, config)
        train = bench_step.Trainer(method, batch, stage=method.stages[0].name)
        on_device = train.put(batch) if on_device is None else on_device
        jax.block_until_ready(train(on_device))
        seconds = []
        for _ in range(config["repeats"]):
            began = time.perf_counter()
            loss = jax.block_until_ready(train(on_device))
            seconds.append(time.perf_counter() - began)
        if not np.isfinite(float(loss)):
            raise RuntimeError(f"the loss of {name} is not finite: the benchmark measures nothing")
        total = patches * config["slides_per_step"]
        metrics[f"{name}[{patches} patches]"] = common.metric(seconds, "s")
        facts[name] = {
            "stage": method.stages[0].name,
            "patches_per_s": total / float(np.median(seconds)),
            "temp_mib": train.temp_mib,
            "compile_seconds": train.compile_seconds,
        }
        del train
        gc.collect()
    return metrics, facts


def run(config: dict[str, Any], smoke: bool, out: Any) -> dict[str, Any]:
    """Measures every bag size and writes the result."""
    metrics, derived = {}, {"smoke": smoke}
    for patches in config["patches"]:
        found, derived[f"{patches} patches"] = measure(config, patches)
        metrics.update(found)
    device = jax.devices()[0]
    return common.write_result(
        out,
        benchmark="bench_methods",
        config={**config, "configurations": {name: METHODS[name] for name in config["methods"]}},
        metrics=metrics,
        derived=derived,
        notes="Seconds per training step of b equal bags in memory, optimizer included, compilation not. float32; "
        "first stage of methods with several. Methods are measured one after the other, not compared with a peer.",
        devices=(device.device_kind, 1),
    )


def main() -> None:
    """Command line."""
    arguments = common.parser("bench_methods", __doc__.splitlines()[0])
    arguments.add_argument("--methods", nargs="+", choices=tuple(METHODS), help="what to measure")
    arguments.add_argument("--patches", type=int, nargs="+", help="patches per bag")
    arguments.add_argument("--repeats", type=int, help="steps of each")
    args = arguments.parse_args()
    config = dict(SMOKE if args.smoke else FULL)
    config |= {k: v for k in ("methods", "patches", "repeats") if (v := getattr(args, k)) is not None}
    run(config, args.smoke, bench_step.result_path(args, "bench_methods"))


if __name__ == "__main__":
    main()
