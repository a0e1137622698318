"""Stain normalisation: tiles per second of this library against NumPy on the same tiles, in turn.

Each method x tile size x work: `transform` (the slide was fitted before, the common case) and `fit+transform` (every
tile fitted on its own). The NumPy side treats one tile after the other in float32, vectorised over pixels, with the
logarithms of the 256 levels from a table. Before anything is timed the two results are compared.

    python -m benchmarks.bench_stain [--smoke] [--out FILE] [--methods macenko] [--sizes 224] [--batch 32] ...
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from histokd_jax.ops.image import colour, macenko, reinhard, vahadane

MODULES = {"macenko": macenko, "reinhard": reinhard, "vahadane": vahadane}
TRANSFORM, BOTH = "transform", "fit+transform"
FULL = {"methods": list(MODULES), "sizes": [224, 256], "batch": 32, "rounds": 100, "repeats": 5}
SMOKE = {"methods": list(MODULES), "sizes": [24], "batch": 3, "rounds": 5, "repeats": 1}


def simulate_tiles(batch: int, size: int) -> np.ndarray:
    """[B, size, size, 3] uint8: two stains with random amounts, glass in a corner."""
    rng = np.random.default_rng(0)
    stains = np.array([[0.60, 0.72, 0.35], [0.12, 0.95, 0.28]])
    amounts = rng.gamma(2.0, 0.35, (batch, size, size, 2)) + 0.05
    amounts[:, : size // 8] = 0
    density = amounts @ stains + rng.normal(0, 0.02, (batch, size, size, 3))
    return np.clip(np.round(245 * np.exp(-density)), 0, 255).astype(np.uint8)


def log_table(background: float, levels: np.ndarray | None = None) -> np.ndarray:
    """[256] float32: optical density of each level (or of what stands for it)."""
    levels = np.arange(256) if levels is None else levels
    return -np.log(np.maximum(levels, 1) / background).astype(np.float32)


def linear_table(levels: np.ndarray | None = None) -> np.ndarray:
    """[256] float32: linear light of each sRGB level (or of what stands for it)."""
    v = (np.arange(256) if levels is None else levels) / 255
    return np.where(v > 0.04045, ((v + 0.055) / 1.055) ** 2.4, v / 12.92).astype(np.float32)


def as_uint8(values: np.ndarray) -> np.ndarray:
    """Rounded and clipped."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


class NumpyMacenko:
    """Macenko's method for one tile."""

    background = macenko.BACKGROUND

    def __init__(self, rounds: int):
        del rounds
        self.table = log_table(self.background)

    def fit(self, tile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(stains [2, 3], maximum [2])."""
        od = self.table[tile.reshape(-1, 3)]
        used = od[(od >= 0.15).all(1)]
        vectors = np.linalg.eigh(np.cov(used.T))[1].astype(np.float32)
        main, second = vectors[:, 2] * np.sign(vectors[:, 2].sum()), vectors[:, 1]
        ends = np.percentile(np.arctan2(used @ second, used @ main), [1, 99])
        stains = np.cos(ends)[:, None] * main + np.sin(ends)[:, None] * second
        stains = stains[np.argsort(-stains[:, 0])].astype(np.float32)
        return stains, np.percentile(used @ np.linalg.pinv(stains), 99, axis=0)

    def transform(self, tile: np.ndarray, source: tuple, target: tuple) -> np.ndarray:
        """uint8."""
        matrix = np.linalg.pinv(source[0]) @ (target[0] * (target[1] / source[1])[:, None])
        return as_uint8(self.background * np.exp(-(self.table[tile] @ matrix.astype(np.float32))))


class NumpyVahadane:
    """The factorisation of `ops.image.vahadane` for one tile."""

    def __init__(self, rounds: int):
        self.rounds = rounds

    def amounts(self, od: np.ndarray, stains: np.ndarray, sparsity: float) -> np.ndarray:
        """[..., 2] exact non-negative amounts."""
        gain = od @ stains.T - np.float32(sparsity)
        cosine = stains[0] @ stains[1]
        both = (gain - cosine * gain[..., ::-1]) / (1 - cosine**2)
        single = np.maximum(gain, 0) * (np.stack([gain[..., 0] >= gain[..., 1], gain[..., 0] < gain[..., 1]], -1))
        return np.where((both >= 0).all(-1, keepdims=True), both, single)

    def fit(self, tile: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """(stains [2, 3], maximum [2], white level)."""
        pixels = tile.reshape(-1, 3)
        white = np.clip(np.percentile(pixels.max(1), 99), 128, 255)
        scaled = np.arange(256) * (255 / white)
        light = linear_table(scaled)[pixels] @ colour.XYZ_OF_RGB[1].astype(np.float32)
        pixels = pixels[light < ((80 + 16) / 116) ** 3]
        od = np.maximum(log_table(white)[pixels], 0)
        start = NumpyMacenko(0)
        start.table = log_table(start.background, scaled)
        stains = np.maximum(start.fit(pixels)[0], 1e-3)
        stains /= np.linalg.norm(stains, axis=1, keepdims=True)
        for _ in range(self.rounds):
            amounts = self.amounts(od, stains, 0.1)
            overlap, projected = amounts.T @ amounts, amounts.T @ od
            for k in range(2):
                step = np.maximum(projected[k] - overlap[k, 1 - k] * stains[1 - k], 0)
                stains[k] = step / np.linalg.norm(step)
        stains = stains[np.argsort(-stains[:, 0])]
        return stains, np.percentile(self.amounts(od, stains, vahadane.TRANSFORM_SPARSITY), 99, axis=0), white

    def transform(self, tile: np.ndarray, source: tuple, target: tuple) -> np.ndarray:
        """uint8."""
        amounts = self.amounts(log_table(source[2])[tile], source[0], vahadane.TRANSFORM_SPARSITY)
        scaled = (target[0] * (target[1] / source[1])[:, None]).astype(np.float32)
        return as_uint8(target[2] * np.exp(-(amounts @ scaled)))


class NumpyReinhard:
    """Reinhard's transfer in CIELAB for one tile."""

    def __init__(self, rounds: int):
        del rounds
        self.table = linear_table()
        self.forward = (colour.XYZ_OF_RGB / colour.WHITE[:, None]).T.astype(np.float32)
        self.backward = (colour.RGB_OF_XYZ * colour.WHITE).T.astype(np.float32)

    def lab(self, pixels: np.ndarray) -> np.ndarray:
        """[..., 3] float32."""
        xyz = self.table[pixels] @ self.forward
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + np.float32(16 / 116))
        x, y, z = np.moveaxis(f, -1, 0)
        return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)

    def fit(self, tile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean [3], std [3])."""
        lab = self.lab(tile.reshape(-1, 3))
        lab = lab[lab[:, 0] < 80]
        return lab.mean(0), lab.std(0)

    def transform(self, tile: np.ndarray, source: tuple, target: tuple) -> np.ndarray:
        """uint8."""
        before = self.lab(tile)
        after = (before - source[0]) * (target[1] / source[1]) + target[0]
        lab = before + np.clip((100 - before[..., :1]) / 20, 0, 1) * (after - before)
        y = (lab[..., 0] + 16) / 116
        f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
        xyz = np.where(f > 0.206893, f**3, (f - np.float32(16 / 116)) / np.float32(7.787))
        light = np.clip(xyz @ self.backward, 0, 1)
        v = np.where(
            light > 0.0031308, 1.055 * np.maximum(light, 0.0031308) ** np.float32(1 / 2.4) - 0.055, 12.92 * light
        )
        return as_uint8(255 * v)


NUMPY = {"macenko": NumpyMacenko, "reinhard": NumpyReinhard, "vahadane": NumpyVahadane}


def numpy_side(method: str, tiles: np.ndarray, rounds: int) -> dict[str, Callable[[], np.ndarray]]:
    """work -> function that treats all tiles, one after the other."""
    peer = NUMPY[method](rounds)
    target = peer.fit(tiles[0])
    slide = peer.fit(tiles[:2])
    return {
        TRANSFORM: lambda: np.stack([peer.transform(t, slide, target) for t in tiles]),
        BOTH: lambda: np.stack([peer.transform(t, peer.fit(t), target) for t in tiles]),
    }


def jax_side(method: str, tiles: np.ndarray, rounds: int) -> dict[str, Callable[[], jax.Array]]:
    """work -> compiled function of all tiles at once, which lie in device memory."""
    module = MODULES[method]
    fit = functools.partial(module.fit, rounds=rounds) if method == "vahadane" else module.fit
    target = jax.jit(fit)(tiles[0].reshape(-1, 3))
    slide = jax.jit(fit)(tiles[:2].reshape(-1, 3))
    here = jnp.asarray(tiles)

    @jax.jit
    def both(tiles):
        return module.transform(tiles, jax.vmap(fit)(tiles.reshape(len(tiles), -1, 3)), target)

    transform = jax.jit(module.transform)
    return {TRANSFORM: lambda: transform(here, slide, target), BOTH: lambda: both(here)}


def tiles_per_second(work: Callable[[], Any], tiles: int) -> float:
    """Of one call, the result included."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return tiles / (time.perf_counter() - start)


def difference(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """How far two uint8 results are apart."""
    gap = np.abs(np.asarray(first, np.int32) - np.asarray(second, np.int32))
    return {"largest_levels": int(gap.max()), "share_differing": float((gap > 0).mean())}


def measure(method: str, size: int, config: Mapping[str, Any]) -> tuple[dict, dict]:
    """(side and work -> tiles/s of every round, work -> difference of the results)."""
    tiles = simulate_tiles(config["batch"], size)
    sides = {"numpy": numpy_side(method, tiles, config["rounds"]), "jax": jax_side(method, tiles, config["rounds"])}
    found, gaps = {}, {}
    for work in (TRANSFORM, BOTH):
        gaps[work] = difference(*(side[work]() for side in sides.values()))
        timed = {
            f"{name} {work}": functools.partial(tiles_per_second, side[work], len(tiles))
            for name, side in sides.items()
        }
        found |= common.alternate(timed, config["repeats"])
    return found, gaps


def run(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Measures all cells and writes the result."""
    metrics, ratio, gaps = {}, {}, {}
    for method in config["methods"]:
        for size in config["sizes"]:
            found, gap = measure(method, size, config)
            metrics |= {f"{method} {size} px {side}": common.metric(v, "tiles/s") for side, v in found.items()}
            for work in (TRANSFORM, BOTH):
                cell = f"{method} {size} px {work}"
                gaps[cell] = gap[work]
                ratio[cell] = float(np.median(found[f"jax {work}"]) / np.median(found[f"numpy {work}"]))
    out = args.out
    if args.smoke and out is None:  # never among the results
        out = pathlib.Path(tempfile.mkdtemp()) / "bench_stain.json"
    return common.write_result(
        out,
        benchmark="bench_stain",
        config=config,
        metrics=metrics,
        derived={"smoke": args.smoke, "times_faster_than_numpy": ratio, "difference": gaps},
        notes="uint8 tiles in, uint8 tiles out; both sides rounded alike. NumPy treats tile after tile, float32.",
        devices=(jax.devices()[0].device_kind, 1),
    )


def main() -> None:
    """Command line."""
    arguments = common.parser("bench_stain", __doc__.splitlines()[0])
    arguments.add_argument("--methods", nargs="+", choices=MODULES)
    arguments.add_argument("--sizes", nargs="+", type=int, help="tile sides in pixels")
    arguments.add_argument("--batch", type=int, help="tiles per call")
    arguments.add_argument("--rounds", type=int, help="alternations of Vahadane's fit")
    arguments.add_argument("--repeats", type=int, help="rounds of the measurement")
    args = arguments.parse_args()
    config = dict(SMOKE if args.smoke else FULL)
    run(config | {k: v for k in config if (v := getattr(args, k, None)) is not None}, args)


if __name__ == "__main__":
    main()
