"""Embedding speed: tiles per second of the encoder alone, of decoding alone, and of both together; MFU.

`encode` takes uint8 tiles in host memory to embeddings in host memory (transfer, normalisation and network); `timm`
does the same with PyTorch in eager mode on the same kind of device (bfloat16 by autocast), in turn with ours, where
torch, torchvision and timm are installed. `decode` reads the tiles of a painted, losslessly compressed slide with
OpenSlide (or of --slide FILE); `end_to_end` is what `histokd embed` does, without writing. MFU is analytic FLOPs of
products per image (2 per multiply-add) times tiles per second over the peak of the devices. Weights are random: speed
does not depend on them. Measure on a quiet machine.

    python -m benchmarks.bench_embed [--smoke] [--encoders vit_small uni ...] [--slide FILE] [--out FILE]
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import common, peaks
from data_pipelines.wsi.coords import TileGrid
from data_pipelines.wsi.slide import open_slide
from histokd_jax.embed import stream
from histokd_jax.embed.embedder import Compute, Embedder
from histokd_jax.embed.tiles import SlideTiles
from histokd_jax.encoders import loading, presets
from histokd_jax.nn.encoders.specs import ViTSpec, forward_flops

CPU = {
    "encoders": ["vit_small", "resnet50_clam"], "dtypes": ["float32"], "batch": 32, "attention": ["xla"],
    "steps": 4, "repeats": 5, "threads": [1, 2], "tiles": 512, "slide_edge": 8192, "compare": True, "devices": 1,
}  # fmt: skip
GPU = {
    "encoders": ["vit_small", "uni", "uni2_h", "virchow2", "gigapath"], "dtypes": ["bfloat16"], "batch": 256,
    "attention": ["xla", "cudnn"], "steps": 8, "repeats": 5, "threads": [4, 16], "tiles": 4096, "slide_edge": 16384,
    "compare": True, "devices": 1,
}  # fmt: skip
SMOKE = {
    "encoders": ["vit_tiny"], "dtypes": ["float32"], "batch": 2, "attention": ["xla"], "steps": 1, "repeats": 2,
    "threads": [2], "tiles": 4, "slide_edge": 512, "compare": False, "devices": 1,
}  # fmt: skip
WARM_UP = 2
MFU_TARGET = 0.4


def paint_slide(path: pathlib.Path, edge: int) -> None:
    """Writes a tiled TIFF of smooth noise, compressed without loss.

    Args:
      path: the file.
      edge: in pixels, a multiple of 256.
    """
    import tifffile

    small = np.random.default_rng(0).integers(120, 250, (edge // 8, edge // 8, 3), dtype=np.uint8)
    pixels = small.repeat(8, axis=0).repeat(8, axis=1)
    with tifffile.TiffWriter(path) as out:
        out.write(
            pixels, tile=(256, 256), photometric="rgb", compression="zlib", resolution=(20000, 20000),
            resolutionunit="CENTIMETER", metadata=None,
        )  # fmt: skip


def grid_over(path: pathlib.Path, count: int, edge: int) -> TileGrid:
    """`count` tiles of `edge` level-0 pixels, row by row and again from the start where the slide has fewer."""
    with open_slide(path) as slide:
        columns, rows = (max(1, size // edge) for size in slide.dimensions)
    places = [((i % columns) * edge, (i // columns % rows) * edge) for i in range(count)]
    return TileGrid("slide", np.array(places, np.int32), edge, edge, 0.5, 20.0)


def encode_rate(embedder: Embedder, tiles: np.ndarray, steps: int) -> Callable[[], float]:
    """A function that embeds the same batch `steps` times, a few steps in flight, and returns tiles/s."""

    def run() -> float:
        began, waiting = time.perf_counter(), []
        for _ in range(steps):
            waiting.append(embedder(tiles))
            if len(waiting) > stream.IN_FLIGHT:
                np.asarray(waiting.pop(0))
        for result in waiting:
            np.asarray(result)
        return steps * len(tiles) / (time.perf_counter() - began)

    for _ in range(WARM_UP):
        np.asarray(embedder(tiles))
    return run


def timm_rate(encoder: presets.Encoder, dtype: str, tiles: np.ndarray, steps: int) -> Callable[[], float]:
    """The same by timm.

    Raises:
      ImportError: it is not installed.
      ValueError: PyTorch does not see the kind of device that JAX uses.
    """
    from benchmarks import timm_peer, torch_peer

    embed = timm_peer.embed_function(encoder, dtype, torch_peer.device_for(jax.default_backend()))

    def run() -> float:
        with torch_peer.all_cores():
            began = time.perf_counter()
            for _ in range(steps):
                embed(tiles)
            return steps * len(tiles) / (time.perf_counter() - began)

    with torch_peer.all_cores():
        for _ in range(WARM_UP):
            embed(tiles)
    return run


def job_of(path: pathlib.Path, grid: TileGrid) -> stream.Job:
    """The tiles of a slide as a job."""
    return stream.Job(0, len(grid), grid.patch_size, lambda: SlideTiles(open_slide(path), grid))


class Nothing:
    """Stands for an encoder that takes no time."""

    stain = None

    def __init__(self, batch: int):
        self.batch = batch

    def __call__(self, tiles: np.ndarray, parameters: Any = None) -> np.ndarray:
        """[batch, 1] zeros."""
        return np.zeros((len(tiles), 1), np.float32)


def stream_rate(embedder: Any, job: stream.Job, threads: int) -> Callable[[], float]:
    """A function that reads and embeds a slide and returns tiles/s."""

    def run() -> float:
        began = time.perf_counter()
        for _, result in stream.embed_jobs([job], embedder, threads=threads):
            if isinstance(result, Exception):
                raise result
        return job.count / (time.perf_counter() - began)

    return run


def cells(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(encoder, dtype, attention) of every measurement; only transformers have an attention to choose."""
    found = []
    for name in config["encoders"]:
        kinds = config["attention"] if isinstance(presets.get(name).spec, ViTSpec) else ["xla"]
        found += [(name, dtype, kind) for dtype in config["dtypes"] for kind in kinds]
    return found


def measure_cell(
    config: Mapping[str, Any], name: str, dtype: str, kind: str, job: stream.Job
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Values of one encoder by side, and what could not be measured."""
    encoder, missing = presets.get(name), {}
    embedder = Embedder(loading.random(encoder, 0), Compute(config["batch"], dtype, kind, config["devices"]))
    size, cell = encoder.transform.size, f"[{name}/{dtype}/{kind}]"
    tiles = np.random.default_rng(0).integers(0, 256, (config["batch"], size, size, 3), dtype=np.uint8)
    sides = {f"encode{cell}": encode_rate(embedder, tiles, config["steps"])}
    for threads in config["threads"]:
        run = stream_rate(embedder, job, threads)
        run()
        sides[f"end_to_end[{name}/{dtype}/{kind}/{threads} threads]"] = run
    if config["compare"] and isinstance(encoder.spec, ViTSpec):
        try:
            sides[f"timm{cell}"] = timm_rate(encoder, dtype, tiles, config["steps"])
        except (ImportError, ValueError) as error:
            missing[f"timm{cell}"] = str(error)
    return common.alternate(sides, config["repeats"]), missing


def utilisation(config: Mapping[str, Any], name: str, dtype: str, rate: float) -> dict[str, Any]:
    """FLOPs per tile, TFLOP/s, and the share of the peak where the device has one."""
    encoder, device = presets.get(name), jax.devices()[0]
    work = forward_flops(encoder.spec, encoder.transform.size)
    facts: dict[str, Any] = {"gflops_per_tile": work / 1e9, "tflops": work * rate / 1e12}
    if device.platform == "cpu":
        return facts | {"mfu": peaks.CPU_REASON}
    ceiling = peaks.lookup(device.device_kind).product_tflops(dtype) * 1e12 * config["devices"]
    mfu = work * rate / ceiling
    return facts | {"mfu": mfu, "mfu_target": MFU_TARGET, "meets_mfu_target": mfu >= MFU_TARGET}


def measure(config: Mapping[str, Any], slide: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """All metrics and derived facts."""
    job = job_of(slide, grid_over(slide, config["tiles"], 256))
    decode = {f"decode[{n} threads]": stream_rate(Nothing(config["batch"]), job, n) for n in config["threads"]}
    values, derived = common.alternate(decode, config["repeats"]), {"not_measured": {}}
    for name, dtype, kind in cells(config):
        found, missing = measure_cell(config, name, dtype, kind, job)
        values |= found
        derived["not_measured"] |= missing
        cell = f"[{name}/{dtype}/{kind}]"
        derived[f"utilisation{cell}"] = utilisation(config, name, dtype, float(np.median(found[f"encode{cell}"])))
        if f"timm{cell}" in found:
            derived[f"encode_over_timm{cell}"] = _ratio(found[f"encode{cell}"], found[f"timm{cell}"])
    return {name: common.metric(v, "tiles/s") for name, v in values.items()}, derived


def _ratio(one: list[float], other: list[float]) -> float:
    return float(np.median(one) / np.median(other))


def main() -> None:
    """Measures and writes the result."""
    parser = common.parser("bench_embed", __doc__.splitlines()[0])
    parser.add_argument("--encoders", nargs="+", default=None)
    parser.add_argument("--slide", type=pathlib.Path, default=None, help="a real slide instead of a painted one")
    args = parser.parse_args()
    backend = jax.default_backend()
    config = dict(SMOKE if args.smoke else CPU if backend == "cpu" else GPU)
    config["encoders"] = args.encoders or config["encoders"]
    if backend != "cpu":
        peaks.lookup(jax.devices()[0].device_kind)
    with tempfile.TemporaryDirectory() as folder:
        path = args.slide or pathlib.Path(folder) / "slide.tiff"
        if args.slide is None:
            paint_slide(path, config["slide_edge"])
        metrics, derived = measure(config, path)
    config["slide"] = "real" if args.slide else "painted"
    notes = "Random weights. Files are in the page cache. " + ("Smoke sizes: no meaning. " if args.smoke else "")
    common.write_result(
        args.out, benchmark="bench_embed", config=config, metrics=metrics, derived={**derived, "smoke": args.smoke},
        notes=notes.strip(), devices=(jax.devices()[0].device_kind, config["devices"]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
