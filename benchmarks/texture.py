"""Texture features of colorectal patches: data, folds, two small networks, all trainings of a setting as one program.

The shared trainer reads slides; here an example is a vector, so the loop is here: features lie on the device once, the
inputs of every family are padded to one width, and folds x seeds train side by side under `vmap`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from histokd_jax import losses
from histokd_jax.methods import terms as compositions

FILE = pathlib.Path("texture_features") / "kather_texture_2016_features.npz"
FAMILIES = ("histogram_lower", "histogram_higher", "perceptual", "gabor_rot_inv", "glcm_rot_inv", "f_lbp")


@dataclasses.dataclass(frozen=True, eq=False)
class Patches:
    """Features of n patches, ordered by class and, within it, by row of the published file.

    Attributes:
      features: family -> [n, width] float32, may hold NaN.
      label: [n] int.
      classes: names.
    """

    features: Mapping[str, np.ndarray]
    label: np.ndarray
    classes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything about the trainings that was fixed before any of them; nothing was tuned on the reported folds.

    Attributes:
      lr: peak rate of AdamW, cosine to 0.
      wd: decay of kernels.
      epochs: passes over the training part.
      b: examples per step.
      teacher: hidden widths.
      student: hidden widths.
      clip: standardised features are clipped to +-clip.
      negatives: K of CRD, drawn with replacement from the other classes of the training part.
      queue: keys of the momentum-free queue.
    """

    lr: float = 3e-3
    wd: float = 1e-4
    epochs: int = 15
    b: int = 64
    teacher: tuple[int, ...] = (128, 64)
    student: tuple[int, ...] = (32, 32)
    clip: float = 5.0
    negatives: int = 64
    queue: int = 512


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a student learns from.

    Attributes:
      terms: as a configuration gives them, see `histokd_jax.methods.terms`; {} for the student alone.
      ce: weight of its cross entropy.
      online: whether the teacher starts anew and learns beside the student.
    """

    terms: Mapping[str, Any]
    ce: float = 1.0
    online: bool = False


def read(folder: pathlib.Path) -> Patches:
    """The patches of the folder of real data."""
    with np.load(folder / FILE) as stored:
        order = np.lexsort((stored["source_row"], stored["label"]))
        features = {name: stored[name][order].astype(np.float32) for name in FAMILIES}
        return Patches(features, stored["label"][order].astype(np.int32), tuple(map(str, stored["class_names"])))


def fold_of_rows(label: np.ndarray, n_folds: int) -> np.ndarray:
    """[n] fold of every row: contiguous blocks of each class, whose rows are in the order of the published file."""
    fold = np.zeros(len(label), np.int32)
    for value in np.unique(label):
        for k, rows in enumerate(np.array_split(np.flatnonzero(label == value), n_folds)):
            fold[rows] = k
    return fold


def standardised(x: np.ndarray, train: np.ndarray, clip: float) -> np.ndarray:
    """[n, width] features by mean and s.d. of the training rows; absent values become the mean (0); clipped."""
    mean, scale = np.nanmean(x[train], axis=0), np.nanstd(x[train], axis=0)
    z = (x - mean) / np.where(scale > 0, scale, 1.0)
    return np.clip(np.nan_to_num(z, nan=0.0), -clip, clip).astype(np.float32)


class VectorNet(nn.Module):
    """Multi-layer perceptron whose layers are views for distillation.

    Attributes:
      widths: of the hidden layers.
      classes: outputs.
    """

    widths: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Views "boundary" (before the last ReLU), "embedding" (behind it), "logits" and "prob" of [b, width]."""
        for k, width in enumerate(self.widths):
            before = nn.Dense(width, name=f"layer_{k}")(x)
            x = nn.relu(before)
        logits = nn.Dense(self.classes, name="head")(x)
        return {"boundary": before, "embedding": x, "logits": logits, "prob": jax.nn.softmax(logits)}


def shapes_of(widths: Sequence[int], classes: int) -> dict[str, tuple[int, ...]]:
    """View -> shape without the batch axis, of a `VectorNet`."""
    return {"boundary": (widths[-1],), "embedding": (widths[-1],), "logits": (classes,), "prob": (classes,)}


def init_net(net: VectorNet, key: jax.Array, padded: int, width: jax.Array | int) -> Any:
    """Parameters of a network whose input of `width` numbers is padded with zeros to `padded`."""
    params = net.init(key, jnp.zeros((1, padded)))["params"]
    # Kernels are drawn for `padded` inputs; only `width` of them ever carry a signal.
    gain = jnp.sqrt(padded / jnp.asarray(width, jnp.float32))
    first = {**params["layer_0"], "kernel": params["layer_0"]["kernel"] * gain}
    return {**params, "layer_0": first}


def optimizer(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """AdamW with cosine to 0; biases and VID's variances do not decay."""
    mask = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    return optax.adamw(optax.cosine_decay_schedule(recipe.lr, steps), weight_decay=recipe.wd, mask=mask)


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """One training of a setting as a function of arrays, to be mapped over folds x seeds.

    Attributes:
      recipe: optimisation.
      setting: loss.
      label: [n] int32 on the device.
      classes: number of classes.
      steps: optimizer steps.
    """

    recipe: Recipe
    setting: Setting
    label: jax.Array
    classes: int
    steps: int

    def train(self, given: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Trains once.

        Args:
          given: "x" [n, P] features of the student, zero beyond its "width" []; "order" [steps, b] rows; "key";
            "by_class" [classes, m] training rows of every class; and unless the student is alone "x_teacher" [n, Q],
            "teacher" (parameters) and "margin" [E].

        Returns:
          "logits" [n, classes] of all rows, "loss" [], the mean of the last ten steps, and "params" of the student.
        """
        params, states = self._init(given)
        tx = optimizer(self.recipe, self.steps)
        start = (params, tx.init(params), states)
        (params, _, _), history = jax.lax.scan(
            functools.partial(self._step, tx, given), start, (jnp.arange(self.steps), given["order"])
        )
        logits = self._student(params, given["x"])["logits"]
        return {"logits": logits, "loss": jnp.mean(history[-10:]), "params": params["student"]}

    @functools.cached_property
    def terms(self) -> tuple[compositions.Term, ...]:
        """The parsed terms."""
        return compositions.parse_terms(self.setting.terms, online=self.setting.online)

    def _init(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        student_key, connector_key, teacher_key, memory_key = jax.random.split(given["key"], 4)
        net = VectorNet(self.recipe.student, self.classes)
        params = {"student": init_net(net, student_key, given["x"].shape[1], given["width"])}
        if not self.terms:
            return params, {}
        views = (shapes_of(widths, self.classes) for widths in (self.recipe.student, self.recipe.teacher))
        params["connectors"] = compositions.init_connectors(connector_key, self.terms, *views)
        if self.setting.online:
            teacher = VectorNet(self.recipe.teacher, self.classes)
            params["teacher"] = teacher.init(teacher_key, given["x_teacher"][:1])["params"]
        rows = given["order"][0]
        links = jax.eval_shape(lambda p: self._links(p, given, rows)[0], params)
        crd = any(term.name == "crd" for term in self.terms)
        length = len(self.label) if crd else self.recipe.queue
        return params, compositions.init_memory(memory_key, self.terms, length, links)

    def _student(self, params: Mapping[str, Any], x: jax.Array) -> dict[str, jax.Array]:
        return VectorNet(self.recipe.student, self.classes).apply({"params": params["student"]}, x)

    def _links(self, params: Mapping[str, Any], given: Mapping[str, Any], rows: jax.Array):
        student = self._student(params, given["x"][rows])
        own = params.get("teacher", given["teacher"])
        teacher = VectorNet(self.recipe.teacher, self.classes).apply({"params": own}, given["x_teacher"][rows])
        views = {**teacher, "boundary_margin": given["margin"]}

        def head(vectors: jax.Array) -> jax.Array:
            frozen = jax.lax.stop_gradient(own["head"])
            return vectors @ frozen["kernel"] + frozen["bias"][None, :]

        links = compositions.connect(
            self.terms, params["connectors"], student, views, online=self.setting.online, head=head
        )
        return links, student, teacher

    def _loss(self, params, given, states, rows, step):
        label = self.label[rows]
        if not self.terms:
            student = self._student(params, given["x"][rows])
            return jnp.mean(losses.cross_entropy(student["logits"], label)), states
        links, student, teacher = self._links(params, given, rows)
        contrast = self._contrast(jax.random.fold_in(given["key"], step), given["by_class"], rows)
        found, states = compositions.values(
            self.terms, links, label=label, states=states, index=rows, contrast=contrast
        )
        value, _ = compositions.total(self.terms, found, step)
        value = value + self.setting.ce * jnp.mean(losses.cross_entropy(student["logits"], label))
        if self.setting.online:
            value = value + jnp.mean(losses.cross_entropy(teacher["logits"], label))
        return value, states

    def _contrast(self, key: jax.Array, by_class: jax.Array, rows: jax.Array) -> jax.Array:
        """[b, K + 1] the row itself and K training rows of other classes, with replacement."""
        shape = (len(rows), self.recipe.negatives)
        class_key, row_key = jax.random.split(key)
        other = self.label[rows][:, None] + jax.random.randint(class_key, shape, 1, self.classes)
        at = jax.random.randint(row_key, shape, 0, by_class.shape[1])
        return jnp.concatenate([rows[:, None], by_class[other % self.classes, at]], axis=1)

    def _step(self, tx, given, carry, drawn):
        (params, optim, states), (step, rows) = carry, drawn
        (value, states), grads = jax.value_and_grad(self._loss, has_aux=True)(params, given, states, rows, step)
        updates, optim = tx.update(grads, optim, params)
        return (optax.apply_updates(params, updates), optim, states), value


def orders(train: np.ndarray, recipe: Recipe, seed: int, fold: int, per_epoch: int) -> np.ndarray:
    """[epochs * per_epoch, b] rows of every step: a new permutation per epoch, incomplete batches dropped."""
    rng = np.random.default_rng([seed, fold])
    epochs = [rng.permutation(train)[: per_epoch * recipe.b] for _ in range(recipe.epochs)]
    return np.concatenate(epochs).reshape(-1, recipe.b).astype(np.int32)


def class_rows(label: np.ndarray, train: np.ndarray, classes: int, length: int) -> np.ndarray:
    """[classes, length] training rows of every class; shorter classes repeat their first."""
    return np.stack([np.resize(train[label[train] == c], length) for c in range(classes)]).astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """Data, folds and seeds of the experiment; trainings are numbered seed-major.

    Attributes:
      patches: data.
      recipe: optimisation.
      seeds: of initialisation and order.
      n_folds: folds.
    """

    patches: Patches
    recipe: Recipe
    seeds: tuple[int, ...]
    n_folds: int

    @functools.cached_property
    def fold(self) -> np.ndarray:
        """[n] fold of every row."""
        return fold_of_rows(self.patches.label, self.n_folds)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(seed, fold) of every training."""
        return [(seed, fold) for seed in self.seeds for fold in range(self.n_folds)]

    @functools.cached_property
    def per_epoch(self) -> int:
        """Steps of an epoch: those that the smallest training part fills."""
        return min(int((self.fold != k).sum()) for k in range(self.n_folds)) // self.recipe.b

    def common(self) -> dict[str, Any]:
        """Arrays [runs, ...] that do not depend on the features: order, keys, training rows by class."""
        label, classes = self.patches.label, len(self.patches.classes)
        train = [np.flatnonzero(self.fold != k) for k in range(self.n_folds)]
        length = max(int(np.bincount(label[rows]).max()) for rows in train)
        keys = [jax.random.fold_in(jax.random.key(seed), fold) for seed, fold in self.runs]
        return {
            "order": jnp.asarray(np.stack([orders(train[f], self.recipe, s, f, self.per_epoch) for s, f in self.runs])),
            "by_class": jnp.asarray(np.stack([class_rows(label, train[f], classes, length) for _, f in self.runs])),
            "key": jnp.stack(keys),
        }

    def inputs(self, families: Sequence[str], padded: int) -> dict[str, Any]:
        """Standardised features [runs, n, padded] of some families, and their "width" [runs]."""
        x = np.concatenate([self.patches.features[name] for name in families], axis=1)
        by_fold = [standardised(x, self.fold != k, self.recipe.clip) for k in range(self.n_folds)]
        by_fold = [np.pad(z, ((0, 0), (0, padded - z.shape[1]))) for z in by_fold]
        stacked = np.stack([by_fold[fold] for _, fold in self.runs])
        return {"x": jnp.asarray(stacked), "width": jnp.full(len(self.runs), x.shape[1])}

    def teacher_margins(self, params: Any, x: jax.Array) -> jax.Array:
        """[runs, E] margins of OFD: the teachers have no batch norm, so moments over the training rows stand for it."""
        net = VectorNet(self.recipe.teacher, len(self.patches.classes))
        before = jax.jit(jax.vmap(lambda p, z: net.apply({"params": p}, z)["boundary"]))(params, x)
        train = jnp.asarray(np.stack([self.fold != fold for _, fold in self.runs]))[:, :, None]
        number = jnp.sum(train, axis=1)
        mean = jnp.sum(jnp.where(train, before, 0.0), axis=1) / number
        square = jnp.where(train, (before - mean[:, None]) ** 2, 0.0)
        return jax.vmap(losses.ofd_margin)(jnp.sqrt(jnp.sum(square, axis=1) / number), mean)

    def trainer(self, setting: Setting) -> Trainer:
        """The training of a setting."""
        label, classes = jnp.asarray(self.patches.label), len(self.patches.classes)
        return Trainer(self.recipe, setting, label, classes, self.per_epoch * self.recipe.epochs)

    def scores(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        """ "correct" and "nll" [seeds, n]: every row judged by the training that did not see it."""
        log_prob = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        log_prob = log_prob.reshape(len(self.seeds), self.n_folds, *log_prob.shape[1:])
        rows = np.arange(len(self.fold))
        held_out = log_prob[:, self.fold, rows]
        label = self.patches.label
        return {"correct": held_out.argmax(-1) == label[None], "nll": -held_out[:, rows, label].astype(np.float32)}
