"""What `exp_paired_gain` trains: pairs in memory, and one program per network whose loss weights are data.

Everything is the library's: networks, flips, losses, cached outputs of a frozen teacher. Only the loop is shorter than
that of `histokd train`: fixed epochs, last parameters, all steps in one program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.pairs import simulate
from data_pipelines.pairs.labels import HER2_CLASSES, LabelRule
from data_pipelines.pairs.plan import Options, make_plan
from data_pipelines.pairs.reader import PairReader
from data_pipelines.pairs.write import run_import
from histokd_jax.methods.hmkd import cache
from histokd_jax.methods.hmkd import method as hmkd
from histokd_jax.methods.hmkd.method import HE, HE_IHC, STUDENT, TEACHER, TEACHER_OUTPUTS
from histokd_jax.types import DataSpec

CLASSES = len(HER2_CLASSES)
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "student_alone": (),
    "kl": ("kl",),
    "attention": ("at_0", "at_1", "at_2"),
    "cosine": ("cos",),
    "all": ("kl", "at_0", "at_1", "at_2", "cos"),
}
"""Setting -> distillation terms beside the cross entropy."""
_STAINS = (("lung-lesion_1", "proSPC"), *(("lung-lesion_3", stain) for stain in ("CD31", "Cc10", "Ki67", "proSPC")))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How every network is trained.

    Attributes:
      epochs, b, lr, momentum, wd: as in configs/hmkd.py; the rate falls by a cosine over all epochs.
      model: changes of `model`.
    """

    epochs: int = 24
    b: int = 16
    lr: float = 1e-2
    momentum: float = 0.9
    wd: float = 5e-4
    model: tuple[tuple[str, Any], ...] = (
        ("widths", (32, 40, 48, 64)),
        ("stem_patch", 8),
        ("teacher_depths", (1, 0, 0, 0)),
        ("student_depths", (1, 0, 0, 0)),
        ("mlp_ratio", 2),
        ("head_hidden", 32),
    )

    def config(self) -> Any:
        """The configuration of the method: the repaired forms (paired flips, cosine as a mean)."""
        cfg = hmkd.default_config()
        known = {key: value for key, value in hmkd.CORRECTED.items() if not key.startswith("split.")}
        known.pop("train.decay_bias")
        cfg.update_from_flattened_dict({**known, **{f"model.{key}": value for key, value in self.model}})
        cfg.train.b = self.b
        return cfg


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Images in memory.

    Attributes:
      image, partner: [n, H, W, 3] uint8.
      label: [n] int32, -1 without grade.
      names: [n].
    """

    image: np.ndarray
    partner: np.ndarray
    label: np.ndarray
    names: tuple[str, ...]

    def rows(self, rows: np.ndarray) -> Pairs:
        """Some of them."""
        return Pairs(self.image[rows], self.partner[rows], self.label[rows], tuple(self.names[i] for i in rows))

    def fields(self) -> dict[str, jax.Array]:
        """As the method reads them."""
        n = len(self.label)
        found = {
            "image": self.image,
            "partner": self.partner,
            "label": np.maximum(self.label, 0).astype(np.int32),
            "has_label": self.label >= 0,
            "has_partner": np.ones(n, bool),
            "example": np.arange(n, dtype=np.int32),
            "weight": np.ones(n, np.float32),
        }
        return {name: jnp.asarray(value) for name, value in found.items()}


def joined(parts: list[Pairs]) -> Pairs:
    """All of them, in order."""
    arrays = (np.concatenate([getattr(p, name) for p in parts]) for name in ("image", "partner", "label"))
    return Pairs(*arrays, tuple(name for p in parts for name in p.names))


def simulated(spec: simulate.PairSpec, part: str) -> Pairs:
    """The train or test part of a simulation, as `histokd simulate --kind pairs` draws it."""
    first, count = (0, spec.n_train) if part == "train" else (spec.n_train, spec.n_test)
    label = np.arange(count, dtype=np.int32) % CLASSES
    drawn = [simulate.draw_pair(spec, first + i, int(grade)) for i, grade in enumerate(label)]
    image, partner = (np.stack(side) for side in zip(*drawn))
    return Pairs(image, partner, label, tuple(f"{part}{i:05d}" for i in range(count)))


def best_accuracy(signal: float) -> float:
    """Accuracy of an ideal reader of the nuclear radius, of which H&E images of one grade have spread 1: the grades
    are `signal` apart, so all but the outermost err on both sides."""
    tail = 0.5 * math.erfc(signal / 2 / math.sqrt(2))
    return 1.0 - 2.0 * (CLASSES - 1) / CLASSES * tail


def read_folder(source: pathlib.Path, side: int, **options: Any) -> Pairs:
    """Pairs of a folder, imported and resized by the pipeline of the library."""
    with tempfile.TemporaryDirectory() as scratch:
        plan = make_plan(source, source.name, Options(resize=(side, side), **options))
        reader = PairReader(run_import(plan, pathlib.Path(scratch) / "data").manifest)
        found = [reader.read(row) for row in range(len(reader.manifest.examples))]
    examples = reader.manifest.examples
    label = np.array([e.label for e in examples], np.int32)
    images = (np.stack([getattr(f, name) for f in found]) for name in ("image", "partner"))
    return Pairs(*images, label, tuple(e.example_id for e in examples))


def read_real(folder: pathlib.Path, side: int) -> tuple[Pairs, Pairs]:
    """(BCI crops with grades, serial sections and tiles with masks without any), all brought to one size."""
    none = {"rule": LabelRule("none")}
    others = [read_folder(folder / "serial_sections_256" / c, side, partner_folder=s, **none) for c, s in _STAINS]
    masks = {"image_folder": "ihc", "partner_folder": "mask"}
    others.append(read_folder(folder / "deepliif" / "ihc_with_mask", side, **masks, **none))
    return read_folder(folder / "bci_her2", side), joined(others)


class Trainer:
    """Compiled trainings of one recipe and one shape of data.

    Args:
      recipe: how.
      side: of the images.
    """

    def __init__(self, recipe: Recipe, side: int):
        self.recipe = recipe
        cfg, data = recipe.config(), DataSpec(feat_dim=0, num_classes=CLASSES, image_size=(side, side))
        self.method, self._run = hmkd.make_method(cfg, data), hmkd.make_run(cfg, data)
        weights = {"kl": cfg.loss.kd_weight, "cos": cfg.loss.cos_weight}
        self.weights = {**{f"at_{i}": cfg.loss.at_weight for i in range(3)}, **weights}
        self.init = jax.jit(self.method.init)
        self._train = {stage: jax.jit(functools.partial(self._steps, stage)) for stage in (TEACHER, STUDENT)}
        self._predict = {mode: jax.jit(functools.partial(self._probs, mode)) for mode in (HE, HE_IHC)}
        wanted = self._run.objective_spec.teacher_outputs()
        self._ask = jax.jit(cache.variant_outputs(self._run.networks[TEACHER], self._run.flip_mode, wanted))

    def order(self, n: int, seed: int) -> np.ndarray:
        """[steps, b] rows of every step; no row twice in an epoch, the last incomplete step is left out."""
        rng, b = np.random.default_rng(seed), self.recipe.b
        epochs = [rng.permutation(n)[: n // b * b].reshape(-1, b) for _ in range(self.recipe.epochs)]
        return np.concatenate(epochs).astype(np.int32)

    def teacher(self, pairs: Pairs, seed: int) -> tuple[Any, Any, np.ndarray]:
        """(parameters, statistics, loss of every step) of a teacher."""
        return self._fit(TEACHER, pairs, seed, {}, {})

    def student(self, pairs: Pairs, seed: int, table: Any, terms: tuple[str, ...]) -> tuple[Any, Any, np.ndarray]:
        """The same of a student of a teacher's outputs; terms that are not named have weight 0."""
        weights = {name: jnp.float32(value if name in terms else 0.0) for name, value in self.weights.items()}
        return self._fit(STUDENT, pairs, seed, {TEACHER_OUTPUTS: table}, weights)

    def ask(self, pairs: Pairs, params: Any, extra: Any) -> dict[str, jax.Array]:
        """Outputs of a teacher for every example and flip."""
        variables, b = {"params": params, "batch_stats": extra}, self.recipe.b
        filled = np.resize(np.arange(len(pairs.label)), -(-len(pairs.label) // b) * b)
        batches = ({**pairs.rows(rows).fields(), "example": rows} for rows in filled.reshape(-1, b))
        found = cache.fill_table(lambda image, partner: self._ask(variables, image, partner), batches, len(pairs.label))
        return {name: jnp.asarray(value) for name, value in found.items()}

    def predict(self, mode: str, pairs: Pairs, params: Any, extra: Any) -> np.ndarray:
        """[n, C] probabilities."""
        n, b = len(pairs.label), self.recipe.b
        filled, fields = np.resize(np.arange(n), -(-n // b) * b).reshape(-1, b), pairs.fields()
        found = [self._predict[mode](params, extra, {k: v[rows] for k, v in fields.items()}) for rows in filled]
        return np.concatenate([np.asarray(f, np.float64) for f in found])[:n]

    def _fit(self, stage: str, pairs: Pairs, seed: int, frozen: Any, weights: Any) -> tuple[Any, Any, np.ndarray]:
        params, extra = self.init(jax.random.key(seed))
        order = self.order(len(pairs.label), seed)
        key = jax.random.fold_in(jax.random.key(seed), (TEACHER, STUDENT).index(stage))
        start = params[stage], extra[stage]
        params, extra, losses = self._train[stage](start, pairs.fields(), order, key, frozen, weights)
        return params, extra, np.asarray(losses)

    def _steps(self, stage, start, data, order, key, frozen, weights):
        recipe, number = self.recipe, len(order)
        epoch = jnp.arange(number) // (number // recipe.epochs)
        rates = recipe.lr * 0.5 * (1.0 + jnp.cos(jnp.pi * epoch / recipe.epochs))

        def step(carry, now):
            params, extra, trace = carry
            rows, index, rate = now
            batch = {name: value[rows] for name, value in data.items()}

            def loss(params):
                own = {stage: params}, frozen, {stage: extra}
                outputs, new = self.method.forward(*own, batch, jax.random.fold_in(key, index), True, stage=stage)
                _, found = self.method.objective(outputs, batch, 0, stage)
                return found["ce"][0] + sum(weights[name] * found[name][0] for name in weights), new[stage]

            (value, extra), grads = jax.value_and_grad(loss, has_aux=True)(params)
            trace = jax.tree.map(lambda t, g, p: recipe.momentum * t + g + recipe.wd * p, trace, grads, params)
            params = jax.tree.map(lambda p, t: p - rate * t, params, trace)
            return (params, extra, trace), value

        carry = *start, jax.tree.map(jnp.zeros_like, start[0])
        (params, extra, _), losses = jax.lax.scan(step, carry, (order, jnp.arange(number), rates))
        return params, extra, losses

    def _probs(self, mode, params, extra, batch):
        network = self.method.mode(mode).params[0]
        return self.method.predict({network: params}, {}, {network: extra}, batch, mode)["prob"]
