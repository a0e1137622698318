"""Cost of the losses: VICReg's covariance at D = 8192 naive against the Gram form, and every entry of the catalogue.

    python -m benchmarks.bench_losses [--smoke] [--out FILE] [--sizes 64x8192 256x8192] [--repeats 5]

Each measurement is one value with gradient, compiled, on random float32 input. The temporary memory is read from the
compiled program.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from histokd_jax import losses
from histokd_jax.losses import catalogue

FULL = {"sizes": ["64x8192", "256x8192"], "batch": 64, "classes": 10, "width": 256, "map": (64, 8, 8), "repeats": 5}
SMOKE = {"sizes": ["8x64"], "batch": 4, "classes": 3, "width": 6, "map": (3, 4, 4), "repeats": 1}
FORMS = ("direct", "gram")
CRD_EXAMPLES, CRD_NEGATIVES = 4096, 1024


def compiled(function: Callable[..., jax.Array], *args: Any) -> Any:
    """The program of a value with its gradients with respect to all floating arguments."""
    return jax.jit(jax.value_and_grad(function)).lower(*args).compile()


def seconds(program: Any, args: tuple) -> float:
    """Time of one call."""
    start = time.perf_counter()
    jax.block_until_ready(program(*args))
    return time.perf_counter() - start


def temporary_mib(program: Any) -> float:
    """Temporary memory of a compiled program."""
    return program.memory_analysis().temp_size_in_bytes / 2**20


def random(*shape: int, seed: int = 0) -> jax.Array:
    """Normal float32 input."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def covariance(sizes: list[str], repeats: int) -> tuple[dict[str, Any], dict[str, float], dict[str, float]]:
    """(metrics, temporary MiB, naive / Gram time) of the covariance term of one branch."""
    metrics, memory, ratio = {}, {}, {}
    for size in sizes:
        b, d = map(int, size.split("x"))
        args, sides = (random(b, d),), {}
        for form in FORMS:
            program = compiled(functools.partial(losses.covariance_penalty, form=form), *args)
            memory[f"covariance {form} {size}"] = temporary_mib(program)
            seconds(program, args)
            sides[form] = functools.partial(seconds, program, args)
        found = common.alternate(sides, repeats)
        metrics |= {f"covariance {form} {size}": common.metric(values, "s") for form, values in found.items()}
        ratio[size] = float(np.median(np.divide(found["direct"], found["gram"])))
    return metrics, memory, ratio


def inputs(name: str, config: Mapping[str, Any]) -> tuple[Any, Any, tuple]:
    """(student, teacher, further arguments) of an entry."""
    entry, b = catalogue.CATALOGUE[name], config["batch"]
    if entry.reads == catalogue.MAP_PAIR:
        channels, *sizes = config["map"]
        shapes = ((channels, *sizes), (channels, *(s // 2 for s in sizes)))
        return *(tuple(random(b, *s, seed=k) for s in shapes) for k in (0, 1)), ()
    shape = {catalogue.LOGITS: (config["classes"],), catalogue.VECTOR: (config["width"],)}.get(
        entry.reads, config["map"]
    )
    student, teacher = (random(b, *shape, seed=k) for k in (0, 1))
    further: dict[str, tuple] = {
        catalogue.LABEL: (jnp.arange(b) % config["classes"],),
        catalogue.RHO: (jnp.full(shape[0], losses.vid_rho()),),
        catalogue.MARGIN: (jnp.full(shape[0], -0.5),),
        catalogue.HEAD_LOGITS: tuple(random(b, config["classes"], seed=k) for k in (2, 3)),
    }
    return student, teacher, sum((further.get(need, ()) for need in entry.needs), ())


def loss_of(name: str, config: Mapping[str, Any]) -> tuple[Callable[..., jax.Array], tuple]:
    """(scalar function of the student, its input) of an entry."""
    entry = catalogue.CATALOGUE[name]
    student, teacher, further = inputs(name, config)
    if name == "crd":
        return _crd(student, teacher, config)
    if name == "queue_infonce":
        state = losses.queue_push(losses.queue_init(max(1024, config["batch"]), config["width"]), teacher)
        return lambda s: jnp.mean(losses.queue_infonce(state, s, teacher)[0]), (student,)
    return lambda s: jnp.mean(entry.function(s, teacher, *further, where=None)), (student,)


def _crd(student: jax.Array, teacher: jax.Array, config: Mapping[str, Any]):
    smoke = config["batch"] < 8
    examples, negatives = (32, 8) if smoke else (CRD_EXAMPLES, CRD_NEGATIVES)
    state = losses.crd_init(jax.random.key(0), examples, config["width"])
    index = jnp.arange(config["batch"])
    contrast = losses.draw_contrast(jax.random.key(1), index, jnp.arange(examples) % config["classes"], negatives)
    return lambda s: jnp.mean(losses.crd_loss(state, s, teacher, index, contrast)[0]), (student,)


def catalogue_costs(config: Mapping[str, Any], repeats: int) -> tuple[dict[str, Any], dict[str, float]]:
    """(metrics, temporary MiB) of every entry, measured in turn."""
    sides, memory = {}, {}
    for name in catalogue.CATALOGUE:
        function, args = loss_of(name, config)
        program = compiled(function, *args)
        memory[name] = temporary_mib(program)
        seconds(program, args)
        sides[name] = functools.partial(seconds, program, args)
    values = common.alternate(sides, repeats)
    return {name: common.metric([1e3 * v for v in found], "ms") for name, found in values.items()}, memory


def main() -> None:
    """Command line."""
    parser = common.parser("bench_losses", __doc__)
    parser.add_argument("--sizes", nargs="*", help="BATCHxWIDTH of the covariance term")
    parser.add_argument("--repeats", type=int)
    args = parser.parse_args()
    config = dict(SMOKE if args.smoke else FULL)
    config |= {key: value for key in ("sizes", "repeats") if (value := getattr(args, key)) is not None}
    metrics, memory, ratio = covariance(config["sizes"], config["repeats"])
    costs, temporary = catalogue_costs(config, config["repeats"])
    common.write_result(
        args.out,
        benchmark="bench_losses",
        config=config,
        metrics={**metrics, **costs},
        derived={
            **({"smoke": True} if args.smoke else {}),
            "naive_over_gram": ratio,
            "temporary_mib": {**memory, **temporary},
        },
        notes="Value and gradient of one loss on random float32 input; the covariance term of one branch, direct "
        "(D x D) against the Gram form (b x b), equal up to rounding.",
        devices=(jax.devices()[0].device_kind, jax.device_count()),
    )


if __name__ == "__main__":
    main()
