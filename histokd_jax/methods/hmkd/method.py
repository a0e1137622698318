"""HM-KD as a `Method`: CoCoFNet is trained on both stains, then frozen to teach a student of H&E alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from histokd_jax.methods.hmkd import cache, encoder, images
from histokd_jax.methods.hmkd import objective as objectives
from histokd_jax.methods.hmkd.config import (
    CACHED,
    CORRECTED,
    FAITHFUL,
    FLIPS,
    TWO_STAGE,
    WEIGHTS,
    default_config,
    distils,
    groups,
    objective_spec,
    paired_spec,
    validate,
)
from histokd_jax.methods.hmkd.objective import STUDENT, TEACHER
from histokd_jax.nn.paired.encoded import Encoded, StemEncoder
from histokd_jax.nn.paired.initial import init_variables
from histokd_jax.nn.paired.networks import Student, Teacher
from histokd_jax.nn.paired.spec import LEVELS, PairedSpec
from histokd_jax.ops.gradient_scale import scale_gradient
from histokd_jax.ops.image import presets
from histokd_jax.ops.image.presets import Recipe
from histokd_jax.types import CLASSIFICATION, Batch, DataSpec, Extra, Method, Mode, Outputs, Params, Stage

__all__ = [
    "CONTROL",
    "CORRECTED",
    "FAITHFUL",
    "FROZEN",
    "HE",
    "HE_IHC",
    "TASKS",
    "UNFROZEN",
    "default_config",
    "make_method",
    "precompute",
    "validate",
]

TASKS = (CLASSIFICATION,)
CONTROL = {key: 0.0 for key in WEIGHTS}
"""Settings of the control arm: the student alone."""
FROZEN: Mapping[str, str] = {TEACHER: "distill.teacher"}
"""Parameter group -> key of the model folder that it is read from, if not empty, in place of being trained."""
UNFROZEN: Mapping[str, str] = {"distill.schedule": TWO_STAGE}
"""Settings under which a run trains the groups of `FROZEN` itself."""
HE, HE_IHC = "he", "he+ihc"
TEACHER_OUTPUTS = "teacher_outputs"
_MODES = {HE: (STUDENT, ("image", "weight")), HE_IHC: (TEACHER, ("image", "partner", "weight"))}
_MODE_OF = {network: mode for mode, (network, _) in _MODES.items()}
_IMAGES = ("image", "partner")
_ALONE = ("image", "label", "has_label", "example", "weight")
_PAIRED = (*_ALONE, "partner", "has_partner")
_DISTILLED = ("logits", "f3", "feat", *(f"map_{side}{level}" for side in "ab" for level in range(LEVELS)))


@dataclasses.dataclass(frozen=True)
class _HmKd:
    """The networks and switches of one run; its methods are the pure functions of the `Method`.

    Attributes:
      networks: "teacher" and "student" -> module, also of those that are not trained.
      trained: the networks that `init` makes.
      spec: the architecture.
      objective_spec: terms and weights of the loss.
      flip_mode: see `images.draw_flips`.
      recipe: augmentation in place of the flips; None for the flips.
      distils: whether the student has a teacher.
      loss_scale: factor on gradients inside the networks; 1 for none.
    """

    networks: Mapping[str, nn.Module]
    trained: tuple[str, ...]
    spec: PairedSpec
    objective_spec: objectives.ObjectiveSpec
    flip_mode: str
    distils: bool
    loss_scale: float = 1.0
    recipe: Recipe | None = None

    def init(self, key: jax.Array) -> tuple[Params, Extra]:
        """Initial parameters and running statistics, both by network; the student's do not depend on the teacher."""
        side = self.spec.stem_patch * 2**LEVELS
        params, extra = {}, {}
        for name in self.trained:
            shapes = ((1, side, side, 3),) * (2 if name == TEACHER else 1)
            own_key = jax.random.fold_in(key, (STUDENT, TEACHER).index(name))
            found = init_variables(self.networks[name], own_key, *shapes)
            params[name], extra[name] = found["params"], found["batch_stats"]
        return params, extra

    def forward(
        self,
        params: Params,
        frozen: Params,
        extra: Extra,
        batch: Batch,
        key: jax.Array | None,
        train: bool,
        stage: str = STUDENT,
    ) -> tuple[Outputs, Extra]:
        """Outputs of the networks that a stage needs, named "student_logits" and so on.

        Args:
          params: network -> parameters.
          frozen: networks that are not trained: "teacher" -> {"params", "batch_stats"}. In its place may stand
            "teacher_outputs", see `histokd_jax.methods.hmkd.cache`. Read before `params`.
          extra: network -> running statistics.
          batch: with the fields in `Method.requires`.
          key: draws the flips; may be None if not `train`.
          train: whether there are flips, and batch norms use the statistics of the batch.
          stage: "teacher", or "student": the teacher then runs in inference mode and is constant.

        Returns:
          (outputs, extra with the new statistics of the network of the stage).
        """
        number = batch["weight"].shape[0]
        flips = images.draw_flips(key, batch["example"], self.flip_mode) if train else images.no_flips(number)

        def prepared(field: str) -> jax.Array:
            if train and self.recipe is not None:
                moved = images.follow_recipe(key, batch["example"], batch[field], self.recipe, field == "partner")
            else:
                moved = images.apply_flips(batch[field], flips.image if field == "image" else flips.partner)
            return images.standardise(moved)

        image = prepared("image")
        tiles = (image, prepared("partner")) if stage == TEACHER else (image,)
        found, stats = self._run(stage, params[stage], extra[stage], tiles, train)
        outputs = objectives.named(stage, found)
        if stage == STUDENT and self.distils:
            which = batch["example"], images.variant_index(flips, self.flip_mode)
            taught = self._taught(params, frozen, extra, which, lambda: (image, prepared("partner")))
            outputs |= jax.lax.stop_gradient(objectives.named(TEACHER, taught))
        return outputs, {**extra, stage: stats}

    def _run(self, name: str, params: Params, stats: Extra, tiles: tuple, train: bool) -> tuple[Outputs, Extra]:
        scaled = scale_gradient(params, 1.0 / self.loss_scale)
        variables = {"params": scaled, "batch_stats": stats}
        if train:
            found, new = self.networks[name].apply(variables, *tiles, True, mutable=["batch_stats"])
            stats = new["batch_stats"]
        else:
            found = self.networks[name].apply(variables, *tiles)
        kept = {output: found[output] for output in _DISTILLED if output in found}
        return scale_gradient(kept, self.loss_scale), stats

    def _taught(self, params, frozen, extra, which: tuple, pair: Callable[[], tuple]) -> Outputs:
        """What the teacher says about a step: from its table, else by asking it."""
        wanted = self.objective_spec.teacher_outputs()
        if TEACHER_OUTPUTS in frozen:
            return {name: frozen[TEACHER_OUTPUTS][name][which] for name in wanted}
        variables = jax.lax.stop_gradient(_variables(TEACHER, params, frozen, extra))
        found = self.networks[TEACHER].apply(variables, *pair())
        return {name: found[name] for name in wanted}

    def objective(
        self, outputs: Outputs, batch: Batch, step: jax.Array | int = 0, stage: str = STUDENT
    ) -> tuple[jax.Array, dict]:
        """Scalar loss and metrics, see `hmkd.objective`."""
        return objectives.objective(self.objective_spec, outputs, batch, step, stage)

    def predict(
        self, params: Params, frozen: Params, extra: Extra, batch: Batch, mode: str, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Predictions of one deployment mode; reads only the parameters and fields that the mode names.

        Args:
          params: the groups of `Method.mode(mode).params`; others may be absent.
          frozen: read for a network that is not in `params`.
          extra: running statistics of the same groups.
          batch: the fields of `Method.mode(mode).fields`; others may be absent.
          mode: "he" (student) or "he+ihc" (teacher).
          key: not used.

        Returns:
          {"prob" [B, C], "logits" [B, C], "embedding" [B, width]}, the embedding being f3.
        """
        del key
        found = self._infer(params, frozen, extra, batch, mode)
        return {
            "prob": jax.nn.softmax(found["logits"], axis=-1),
            "logits": found["logits"],
            "embedding": found["f3"],
        }

    def attention(self, params: Params, frozen: Params, extra: Extra, batch: Batch, mode: str) -> jax.Array:
        """[B, h, w] float32: how strongly every token of the finest level is read in its cross block.

        The energy of the columns of A_a, the map that is distilled: the root of the mean square over queries, divided
        by its sum over the tile.
        """
        found = self._infer(params, frozen, extra, batch, mode)
        energy = jnp.sqrt(jnp.mean(jnp.square(found["map_a0"]), axis=1))
        energy = energy / jnp.maximum(jnp.sum(energy, axis=1, keepdims=True), 1e-30)
        return energy.reshape(found["stream_a0"].shape[:3]).astype(jnp.float32)

    def _infer(self, params, frozen, extra, batch, mode) -> Outputs:
        network, fields = _MODES.get(mode, (None, ()))
        known = [m for m, (name, _) in _MODES.items() if name in self.networks]
        if mode not in known:
            raise ValueError(f"mode {mode!r} is not available in this run; it has {known}")
        missing = [field for field in fields if field not in batch]
        if missing:
            raise ValueError(f"the batch has no {missing}; present: {sorted(batch)}. Mode {mode!r} reads them")
        for field in (field for field in fields if field in _IMAGES):
            images.check_images(batch[field])
        tiles = [images.standardise(batch[field]) for field in fields if field in _IMAGES]
        return self.networks[network].apply(_variables(network, params, frozen, extra), *tiles)

    def modes(self) -> tuple[Mode, ...]:
        """The deployment modes of the networks that are trained here, the student's first."""
        return tuple(Mode(m, (n,), fields) for m, (n, fields) in _MODES.items() if n in self.trained)


def _variables(name: str, params: Params, frozen: Params, extra: Extra) -> dict[str, Any]:
    if name in frozen:
        return dict(frozen[name])
    if name not in params or name not in extra:
        raise ValueError(f"parameters and statistics of {name!r} are needed but absent; present: {sorted(params)}")
    return {"params": params[name], "batch_stats": extra[name]}


def _stages(names: tuple[str, ...], frozen: tuple[str, ...]) -> tuple[Stage, ...]:
    return tuple(Stage(name, (name,), (_MODE_OF[name],), frozen=frozen) for name in names)


def _network(name: str, spec: PairedSpec, stem: StemEncoder | None) -> nn.Module:
    if stem is not None:
        return Encoded(spec, stem, paired=name == TEACHER)
    return Teacher(spec) if name == TEACHER else Student(spec)


def make_run(config: ml_collections.ConfigDict, data: DataSpec) -> _HmKd:
    """The networks and switches of a validated configuration, see `make_method`."""
    trained, taught = groups(config), distils(config)
    spec = paired_spec(config, data.num_classes)
    stem = encoder.stem_of(config)
    present = (TEACHER, STUDENT) if taught and STUDENT in trained else trained
    return _HmKd(
        networks={name: _network(name, spec, stem) for name in present},
        trained=trained,
        spec=spec,
        objective_spec=objective_spec(config),
        flip_mode=config.data.flip_mode,
        distils=taught,
        loss_scale=config.loss.scale if config.train.compute_dtype == "float16" else 1.0,
        recipe=None if config.data.augment == FLIPS else presets.recipe(config.data.augment),
    )


def precompute(
    config: ml_collections.ConfigDict,
    data: DataSpec,
    frozen: Mapping[str, Any],
    batches: Callable[[], Iterable[Mapping[str, Any]]],
    examples: int,
) -> dict[str, Any]:
    """What stands for the frozen teacher in `forward`: itself, or (distill.schedule = cached) a table of its outputs.

    Args:
      config: with the keys of `default_config`.
      data: as for `make_method`.
      frozen: "teacher" -> {"params", "batch_stats"}.
      batches: gives one pass over the training examples.
      examples: in the whole data set.
    """
    if config.distill.schedule != CACHED:
        return dict(frozen)
    run = make_run(config, data)
    ask = jax.jit(cache.variant_outputs(run.networks[TEACHER], run.flip_mode, run.objective_spec.teacher_outputs()))
    table = cache.fill_table(functools.partial(ask, frozen[TEACHER]), batches(), examples)
    return {TEACHER_OUTPUTS: table}


def make_method(config: ml_collections.ConfigDict, data: DataSpec) -> Method:
    """Builds HM-KD.

    Args:
      config: with the keys of `default_config`.
      data: number of classes, and the image size if it is known.

    Returns:
      The method. With all weights 0 it is the student alone; with `distill.teacher` the teacher is not trained but
      handed to `forward` in `frozen`.

    Raises:
      ValueError: on an unknown or contradictory switch, or images that are too small.
    """
    validate(config)
    if data.num_classes < 2:
        raise ValueError(f"classification needs at least 2 classes, the data set has {data.num_classes}")
    run = make_run(config, data)
    size = getattr(data, "image_size", None)
    stem = encoder.stem_of(config)
    if size is not None:
        run.spec.check_size(*size)
        if stem is not None:
            stem.spec.check_image(*size)
    modes = run.modes()
    wanted = config.get("infer", {}).get("mode", modes[0].name)
    if wanted not in [mode.name for mode in modes]:
        raise ValueError(f"infer.mode = {wanted!r} is not possible; expected one of {[m.name for m in modes]}")
    return Method(
        name="hmkd",
        init=run.init,
        forward=run.forward,
        objective=run.objective,
        predict=run.predict,
        attention=run.attention,
        modes=modes,
        stages=_stages(run.trained, encoder.PARTS if stem is not None and stem.frozen else ()),
        requires=_PAIRED if run.distils or TEACHER in run.trained else _ALONE,
        # Batch norms couple the examples of a step.
        batch_coupled=True,
        load=None if stem is None else functools.partial(_load, config),
    )


def _load(config: ml_collections.ConfigDict, params: Params, extra: Extra) -> tuple[Params, Extra]:
    return encoder.with_weights(encoder.read_weights(config), params, extra)
