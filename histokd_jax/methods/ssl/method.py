"""More From Less and TriDeNT as a `Method`: encoders and projectors of branches under a joint-embedding loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from histokd_jax.methods.ssl import config as settings
from histokd_jax.methods.ssl import objective as objectives
from histokd_jax.methods.ssl import views as seen
from histokd_jax.methods.ssl.config import default_config, validate
from histokd_jax.methods.ssl.layout import (
    IMAGE,
    PARTNER,
    PRIMARY_ENCODER,
    PRIVILEGED_ENCODER,
    SKIP,
    Layout,
    encoder_group,
    projector_group,
)
from histokd_jax.methods.ssl.networks import STATS, Network, apply, dense_network, image_network
from histokd_jax.methods.ssl.objective import ObjectiveSpec
from histokd_jax.methods.ssl.views import Views
from histokd_jax.types import REPRESENTATION, Batch, DataSpec, Extra, ImageEncoder, Method, Mode, Outputs, Params, Stage

__all__ = ["TASKS", "default_config", "image_encoders", "make_method", "validate"]

TASKS = (REPRESENTATION,)
PRETRAIN, VIEWS = "pretrain", "views"
ENCODER_FOLDER, PRIVILEGED_FOLDER = "encoder", "encoder_privileged"
_PROJECTORS_FROM = 1000


@dataclasses.dataclass(frozen=True)
class _Ssl:
    """The networks and switches of one run; its methods are the pure functions of the `Method`.

    Attributes:
      layout: the branches.
      networks: parameter group -> network.
      views: inputs of the branches.
      objective_spec: the loss.
      fixed: groups whose batch norms stay in inference mode.
      frozen: those of them whose weights get no gradient.
      shards: consecutive parts of a step with batch statistics of their own.
      mask_missing: whether absent views are kept out of batch statistics.
    """

    layout: Layout
    networks: Mapping[str, Network]
    views: Views
    objective_spec: ObjectiveSpec
    fixed: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    shards: int = 1
    mask_missing: bool = True

    def init(self, key: jax.Array) -> tuple[Params, Extra]:
        """Initial parameters, and running averages of the groups that have batch norms; both by group."""
        params, extra = {}, {}
        for group, network in self.networks.items():
            kind, number = group.split("_")
            place = int(number) + (_PROJECTORS_FROM if kind == "projector" else 0)
            found = network.init(jax.random.fold_in(key, place))
            params[group] = found["params"]
            if STATS in found:
                extra[group] = found[STATS]
        return params, extra

    def forward(
        self,
        params: Params,
        frozen: Params,
        extra: Extra,
        batch: Batch,
        key: jax.Array | None,
        train: bool,
        stage: str = PRETRAIN,
    ) -> tuple[Outputs, Extra]:
        """Embeddings of all branches.

        Args:
          params: by group.
          frozen: not used.
          extra: running averages by group.
          batch: with the fields in `Method.requires`.
          key: draws augmentations and privileged sources; None: those of every evaluation.
          train: whether batch norms use the statistics of the batch.
          stage: not used.

        Returns:
          ({"z_K" [B, D], "valid_K" [B] bool, "h_0" [B, features]}, new running averages).
        """
        del frozen, stage
        inputs, valid = seen.make_views(self.views, key, batch, train)
        outputs, extra = {}, dict(extra)
        numbers = zip(self.layout.inputs, self.layout.encoders, self.layout.projectors)
        for k, ((name, encoder, projector), x) in enumerate(zip(numbers, inputs)):
            where = valid[k] if name == PARTNER and self.mask_missing else None
            z = self._pass(encoder_group(encoder), params, extra, x, where, train)
            outputs |= {"h_0": z} if k == 0 else {}
            if projector != SKIP:
                z = self._pass(projector_group(projector), params, extra, z, where, train)
            outputs |= {f"z_{k}": z, f"valid_{k}": valid[k]}
        return outputs, extra

    def _pass(self, group: str, params: Params, extra: dict, x: jax.Array, where: Any, train: bool) -> jax.Array:
        """One pass; the new averages replace those in `extra`."""
        own = jax.lax.stop_gradient(params[group]) if group in self.frozen else params[group]
        active = train and group not in self.fixed
        found, stats = apply(
            self.networks[group], own, extra.get(group), x, train=active, where=where, shards=self.shards
        )
        if group in extra:
            extra[group] = stats
        return found

    def predict(
        self, params: Params, frozen: Params, extra: Extra, batch: Batch, mode: str, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """What every example adds to the loss of its step, batch norms in inference mode.

        Args:
          params: all groups.
          frozen: not used.
          extra: running averages.
          batch: the fields of the mode.
          mode: "views".
          key: draws other augmentations than those of every evaluation.

        Returns:
          {"loss" [B], "together" [B] how many examples the step holds, "embedding" [B, features] of the first branch}.
        """
        if mode != VIEWS:
            raise ValueError(f"mode {mode!r} is not available in this run; it has {VIEWS!r}")
        outputs, _ = self.forward(params, frozen, extra, batch, key, False)
        real = batch["weight"] > 0
        each, _ = objectives.sharded_losses(self.objective_spec, *objectives.branch_outputs(outputs), real)
        together = jnp.broadcast_to(jnp.sum(real).astype(jnp.float32), real.shape)
        return {"loss": each, "together": together, "embedding": outputs["h_0"]}


def make_run(config: ml_collections.ConfigDict, data: DataSpec) -> _Ssl:
    """The networks and switches of a validated configuration, see `make_method`."""
    layout, dtype = settings.layout_of(config), settings.DTYPES[config.train.compute_dtype]
    devices = max(int(config.mesh.data), 1) if "mesh" in config else 1
    networks = {encoder_group(n): _encoder(config, data, layout, n, dtype) for n in sorted(set(layout.encoders))}
    networks |= _projectors(config, layout, networks, dtype)
    _check_embeddings(config, layout, networks)
    frozen = tuple(config.train_flags.frozen)
    return _Ssl(
        layout=layout,
        networks=networks,
        views=_views(config, data, layout),
        objective_spec=settings.objective_spec(config, devices),
        fixed=frozen,
        frozen=frozen if config.train_flags.mode == settings.FREEZE else (),
        shards=devices if config.bn.scope == settings.PER_DEVICE else 1,
        mask_missing=config.bn.mask_missing,
    )


def _views(config: ml_collections.ConfigDict, data: DataSpec, layout: Layout) -> Views:
    recipe = seen.image_recipe(config.augment)
    partner = seen.vector_pipeline(config.augment) if data.vector_size else recipe.partner
    return Views(
        layout=layout,
        pipelines=tuple(partner if name == PARTNER else recipe.image for name in layout.inputs),
        shared_geometry=recipe.shared_geometry,
        source=config.privileged.source,
        blank=config.privileged.blank,
        input=config.encoder.input,
        validation=config.augment.validation,
        vector_size=data.vector_size,
    )


def _kind(config: ml_collections.ConfigDict, data: DataSpec, layout: Layout, number: int) -> str:
    """What an encoder is: "resnet", "vit" or "mlp"."""
    fields = layout.input_of(number)
    vector = PARTNER in fields and data.vector_size > 0
    if vector and IMAGE in fields:
        raise ValueError(
            f"layout.encoders: encoder {number} cannot read images and vectors of {data.vector_size} numbers"
        )
    if number != PRIVILEGED_ENCODER or IMAGE in fields:
        return settings.MLP if vector else config.encoder.kind
    kind = config.privileged_encoder.kind
    if kind == settings.AUTO:
        return settings.MLP if vector else config.encoder.kind
    if (kind == settings.MLP) != vector:
        there = f"vectors of {data.vector_size} numbers" if vector else "images"
        raise ValueError(
            f"privileged_encoder.kind = {kind!r} does not read {there}, which the data set has: set it to auto"
        )
    return kind


def _encoder(config: ml_collections.ConfigDict, data: DataSpec, layout: Layout, number: int, dtype: Any) -> Network:
    kind = _kind(config, data, layout, number)
    if kind != settings.MLP:
        return image_network(settings.encoder_spec(config, kind, data.image_size[0]), data.image_size, dtype)
    widths = tuple(config.privileged_encoder.widths)
    if not widths:
        raise ValueError("privileged_encoder.widths is empty: the encoder of vectors needs at least one layer")
    return dense_network(data.vector_size, widths, dtype=dtype)


def _projectors(config: ml_collections.ConfigDict, layout: Layout, encoders: Mapping[str, Network], dtype: Any) -> dict:
    """Group -> projector; none if projector.widths is empty."""
    own, split, found = config.projector, tuple(config.loss.split_dims), {}
    for k, (encoder, number) in enumerate(zip(layout.encoders, layout.projectors)):
        if number == SKIP:
            continue
        inputs = encoders[encoder_group(encoder)].features
        last = split[k - 1] if split and k else own.widths[-1]
        options = {"bn_eps": own.bn_eps, "bn_momentum": own.bn_momentum, "last_bias": own.last_bias, "dtype": dtype}
        network = dense_network(inputs, (*own.widths[:-1], last), **options)
        group = projector_group(number)
        if found.setdefault(group, network) != network:
            raise ValueError(
                f"layout.projectors: {group} would have to map {found[group].sample[0]} to {found[group].features} and "
                f"{inputs} to {last} numbers: give these branches projectors of their own"
            )
    return {group: found[group] for group in layout.groups() if group in found}


def _check_embeddings(config: ml_collections.ConfigDict, layout: Layout, networks: Mapping[str, Network]) -> None:
    """All branches must be comparable."""
    groups = [encoder_group(e) if p == SKIP else projector_group(p) for e, p in zip(layout.encoders, layout.projectors)]
    widths = [networks[group].features for group in groups]
    split = tuple(config.loss.split_dims)
    if split and (sum(split) != widths[0] or list(split) != widths[1:]):
        raise ValueError(f"loss.split_dims = {split} do not divide embeddings of widths {widths}: the first is the sum")
    if not split and len(set(widths)) > 1:
        raise ValueError(
            f"the branches have embeddings of widths {widths} ({', '.join(groups)}), which cannot be compared: give "
            "the same last width to all of them (projector.widths, privileged_encoder.widths)"
        )


def image_encoders(config: ml_collections.ConfigDict, data: DataSpec) -> dict[str, ImageEncoder]:
    """The image encoders of a run: parameter group -> how others use it, see `histokd_jax.types.ImageEncoder`.

    Args:
      config: with the keys of `default_config`.
      data: size of the images.
    """
    layout, found = settings.layout_of(config), {}
    raw = config.encoder.input == seen.RAW
    mean, std, scale = ((0.0,) * 3, (1.0,) * 3, 1.0) if raw else (seen.MEAN, seen.STD, 255.0)
    for number in sorted(set(layout.encoders)):
        kind = _kind(config, data, layout, number)
        if kind == settings.MLP:
            continue
        primary = IMAGE in layout.input_of(number)
        wanted = number == PRIMARY_ENCODER if primary else config.export.privileged or IMAGE not in layout.inputs
        folder = ENCODER_FOLDER if primary else PRIVILEGED_FOLDER
        found[encoder_group(number)] = ImageEncoder(
            name=f"ssl_{config.layout.name}" + ("" if primary else "_privileged"),
            spec=settings.encoder_spec(config, kind, data.image_size[0]),
            size=data.image_size[0],
            mean=mean,
            std=std,
            scale=scale,
            start=config.encoder.init if primary else config.privileged_encoder.init,
            export=folder if wanted else "",
        )
    return found


def make_method(config: ml_collections.ConfigDict, data: DataSpec) -> Method:
    """Builds pre-training.

    Args:
      config: with the keys of `default_config`.
      data: size of the images, and length of the privileged vectors if they are vectors.

    Returns:
      The method; its one mode gives the loss, what is deployed are the encoders of `image_encoders`.

    Raises:
      ValueError: an unknown or contradictory switch, data that are no pairs, images that are not square or too small
        for the encoder, or networks that do not fit each other.
    """
    validate(config)
    _check_data(config, data)
    run = make_run(config, data)
    fields = (*(f for f in (IMAGE, PARTNER) if f in run.layout.inputs), "example", "weight")
    fields += ("has_partner",) if run.layout.reads_partner() else ()
    groups = run.layout.groups()
    trainable = tuple(group for group in groups if group not in run.frozen)
    return Method(
        name="ssl",
        init=run.init,
        forward=run.forward,
        objective=functools.partial(objectives.objective, run.objective_spec, run.layout.inputs),
        predict=run.predict,
        modes=(Mode(VIEWS, groups, fields),),
        stages=(Stage(PRETRAIN, trainable, (VIEWS,)),),
        requires=fields,
        batch_coupled=True,
    )


def _check_data(config: ml_collections.ConfigDict, data: DataSpec) -> None:
    if data.image_size is None:
        raise ValueError("ssl reads image pairs: set data.kind=pairs and give such a data set")
    height, width = data.image_size
    if height != width:
        raise ValueError(
            f"images of {height} x {width} pixels: an exported encoder has square tiles; import them with `histokd "
            f"pairs --resize {min(height, width)}x{min(height, width)}`"
        )
    settings.encoder_spec(config, config.encoder.kind, height).check_image(height, width)
