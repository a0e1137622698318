"""MoMKD as a `Method`: parameter groups, preparation, forward pass, objective, deployment from a slide alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from histokd_jax.methods.momkd import memory
from histokd_jax.methods.momkd import objective as objectives
from histokd_jax.methods.momkd.config import (
    EMA,
    FAITHFUL,
    GRADIENT,
    KMEANS,
    PAPER_HPARAMS,
    default_config,
    network_spec,
    objective_spec,
    validate,
)
from histokd_jax.methods.momkd.initialisation import class_pools, spherical_kmeans
from histokd_jax.methods.momkd.networks import (
    GENES,
    MEMORY,
    SLIDE,
    Encoded,
    GeneNet,
    Graphs,
    NetworkSpec,
    SlideNet,
    initial_codes,
)
from histokd_jax.types import CLASSIFICATION, Batch, DataSpec, Extra, Method, Mode, Outputs, Params, Stage

__all__ = ["CONTROL", "FAITHFUL", "PAPER_HPARAMS", "PATHOLOGY", "TASKS", "MoMkd"]
__all__ += ["default_config", "make_method", "make_run", "validate"]

TASKS = (CLASSIFICATION,)
CONTROL = {"loss.alpha_gene": 0.0}
"""With `loss.lambda_rec` at 0, the same training without genes: memories that only slides move."""
PATHOLOGY = "pathology"
_GRAPH_FIELDS = ("patches", "segment_ids", "positions", "neighbours")
_CODES = "codes"


@dataclasses.dataclass(frozen=True)
class MoMkd:
    """The networks and switches of one run; its methods are the pure functions of the `Method`.

    Codes that gradients move are the parameter group "MEMORY"; others are extra state of the slide branch.

    Attributes:
      spec: the architecture.
      objective_spec: weights and constants of the loss terms.
      update: "gradient", "ema" or "fixed".
      momentum: of the moving average.
      move_codes: see `memory.commit_loss`.
      align_tau: sharpness of the soft maximum in the alignment losses.
      pool_size: patches per class that k-means sees; 0: codes stay random.
      iterations: of k-means.
      renormalise: whether codes are scaled to unit length after every update.
    """

    spec: NetworkSpec
    objective_spec: objectives.ObjectiveSpec
    update: str = GRADIENT
    momentum: float = 0.99
    move_codes: bool = False
    align_tau: float = 5.0
    pool_size: int = 50_000
    iterations: int = 20
    renormalise: bool = False

    @property
    def slide_net(self) -> SlideNet:
        """Module of the group "SLIDE"."""
        return SlideNet(self.spec)

    @property
    def gene_net(self) -> GeneNet | None:
        """Module of the group "GENES"; None without genes."""
        return GeneNet(self.spec) if self.spec.num_genes else None

    def groups(self) -> tuple[str, ...]:
        """The parameter groups of the run."""
        genes = (GENES,) if self.spec.num_genes else ()
        return (SLIDE, *((MEMORY,) if self.update == GRADIENT else ()), *genes)

    def init(self, key: jax.Array) -> tuple[Params, Extra]:
        """Initial parameters, float32; a network's values do not depend on which others are present."""
        keys = {name: jax.random.fold_in(key, i) for i, name in enumerate((SLIDE, MEMORY, GENES))}
        # A multiple of the devices in rows and patches per row, so that any mesh can divide them.
        n = jax.device_count()
        ids = jnp.ones((n, n), jnp.int32)
        none = jnp.zeros((n, n, 1), jnp.int32)
        graphs = Graphs(jnp.zeros((n, n, self.spec.feat_dim)), ids, jnp.zeros_like(ids), none, num_slots=1)
        codes = initial_codes(keys[MEMORY], self.spec)
        params: dict[str, Any] = {SLIDE: self.slide_net.init(keys[SLIDE], graphs, codes)["params"]}
        if self.gene_net is not None:
            params[GENES] = self.gene_net.init(keys[GENES], jnp.zeros((1, self.spec.num_genes)))["params"]
        return self._with_codes(params, {}, codes)

    def _with_codes(self, params: Params, extra: Extra, codes: jax.Array) -> tuple[Params, Extra]:
        if self.update == GRADIENT:
            return {**params, MEMORY: {_CODES: codes}}, extra
        return params, {SLIDE: {_CODES: codes}}

    def codes(self, params: Params, extra: Extra) -> jax.Array:
        """[2, n, S] raw codes, of class 0 and class 1."""
        place, group = (params, MEMORY) if self.update == GRADIENT else (extra, SLIDE)
        if group not in place:
            raise ValueError(f"the memories ({group!r}) are needed but absent; present: {sorted(place)}")
        return place[group][_CODES]

    def prepare(
        self, params: Params, extra: Extra, batches: Callable[[], Iterable[Batch]], seed: int
    ) -> tuple[Params, Extra]:
        """Replaces random codes by centres of the patches of each class (section 4).

        Args:
          params: from `init`.
          extra: from `init`.
          batches: one pass over the training slides.
          seed: of the sample of patches.

        Returns:
          (params, extra) with other codes.

        Raises:
          ValueError: a class has fewer patches than codes.
        """
        self._check_classes()
        pools = class_pools(self._spheres(params, extra, batches()), self.pool_size, seed)
        found = np.stack([spherical_kmeans(pool.vectors, self.spec.codes, self.iterations) for pool in pools])
        return self._with_codes(params, extra, jnp.asarray(found))

    def _spheres(self, params: Params, extra: Extra, batches: Iterable[Batch]) -> Iterator[tuple[np.ndarray, ...]]:
        @jax.jit
        def sphere(params, codes, batch):
            return self.slide_net.apply({"params": params}, _graphs(batch), codes, method="encode").sphere

        fields = ("segment_ids", "positions", "slide_index", "label")
        for batch in batches:
            vectors = sphere(params[SLIDE], self.codes(params, extra), batch)
            segments, positions, slides, labels = (np.asarray(batch[name]) for name in fields)
            yield np.asarray(vectors), segments.reshape(-1), positions.reshape(-1), slides, labels

    def forward(
        self,
        params: Params,
        frozen: Params,
        extra: Extra,
        batch: Batch,
        key: jax.Array | None,
        train: bool,
        stage: str = objectives.TRAIN,
    ) -> tuple[Outputs, Extra]:
        """What the objective needs of every slide.

        Args:
          params: {"SLIDE", "MEMORY", "GENES"}, what the run has of them.
          frozen: not used.
          extra: {"SLIDE": {"codes"}} where no gradient moves the memories, else {}.
          batch: with the fields in `Method.requires`.
          key: seeds the dropout masks; may be None if not `train`.
          train: whether dropout is on and a moving average moves.
          stage: not used; there is one.

        Returns:
          ({"logits" [S, 2], "slide" [S, d], "gap_slide", "commit", "orth" [S], and with genes "gene" [S, d], "gap_gene"
          [S], "reconstruction" [S, K]}, new extra state).
        """
        del frozen, stage
        outputs = self.details(params, extra, batch, key if train else None)
        patches = outputs.pop("patches")
        if train and self.update == EMA:
            extra = {SLIDE: {_CODES: self._moved(extra, patches, batch)}}
        return {name: value for name, value in outputs.items() if name not in ("pooled", "gene_embedding")}, extra

    def _moved(self, extra: Extra, patches: Encoded, batch: Batch) -> jax.Array:
        label, real = _patch_labels(patches.segment_ids, batch)
        return memory.moved(extra[SLIDE][_CODES], patches.sphere, label, real, self.momentum)

    def details(self, params: Params, extra: Extra, batch: Batch, key: jax.Array | None = None) -> dict[str, Any]:
        """All results of a forward pass: those of `forward`, "pooled", "gene_embedding", and "patches": `Encoded`."""
        self._check_classes()
        codes, slots = self.codes(params, extra), batch["weight"].shape[0]
        outputs = self.slide_net.apply({"params": params[SLIDE]}, _graphs(batch), codes, _seed(key, 0))
        patches: Encoded = outputs["patches"]
        label, real = _patch_labels(patches.segment_ids, batch)
        commit = jnp.where(real, memory.commit_loss(patches.sphere, codes, label, self.move_codes), 0.0)
        total, count = (
            jax.ops.segment_sum(x, patches.segment_ids, slots + 1)[1:] for x in (commit, real.astype(commit.dtype))
        )
        outputs["commit"] = total / jnp.maximum(count, 1.0)
        per_class = memory.orth_codes(codes)
        outputs["orth"] = jnp.where(batch["label"] == memory.POSITIVE, per_class[1], per_class[0])
        outputs["gap_slide"] = memory.similarity_gap(outputs["slide"], codes, self.align_tau)
        if self.gene_net is not None:
            outputs |= self.gene_net.apply({"params": params[GENES]}, _genes(batch), _seed(key, 1))
            outputs["gap_gene"] = memory.similarity_gap(outputs["gene"], codes, self.align_tau)
        return outputs

    def objective(
        self,
        outputs: Outputs,
        batch: Batch,
        step: jax.Array | int = 0,
        stage: str = objectives.TRAIN,
        values: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict]:
        """Scalar loss and metrics, see `histokd_jax.methods.momkd.objective`; `values` as in `Method.objective`."""
        spec = self.objective_spec if values is None else self.objective_spec.with_values(values)
        return objectives.objective(spec, outputs, batch, step, stage)

    def _check_classes(self) -> None:
        if self.spec.num_classes != 2:
            raise ValueError(
                f"MoMKD has a memory for each of two classes, the data set has {self.spec.num_classes}: choose a task "
                "of two classes"
            )

    def after_update(self, params: Params) -> Params:
        """Codes scaled to unit length."""
        return {**params, MEMORY: {_CODES: memory.normalise(params[MEMORY][_CODES])}}

    def predict(
        self, params: Params, frozen: Params, extra: Extra, batch: Batch, mode: str, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Predictions from slides alone; no gene is read, and the gene branch may be absent.

        Args:
          params: {"SLIDE", "MEMORY"}; without "MEMORY" where no gradient moves the memories.
          frozen: not used.
          extra: as in `forward`.
          batch: graph fields and "weight".
          mode: "pathology".
          key: not used; there is no teacher.

        Returns:
          {"prob": [S, 2], "logits": [S, 2], "embedding": [S, D]} in float32.
        """
        del frozen, key
        _check_mode(mode)
        out = self.slide_net.apply({"params": params[SLIDE]}, _graphs(batch), self.codes(params, extra))
        return {
            "prob": jax.nn.softmax(out["logits"], axis=-1),
            "logits": out["logits"],
            "embedding": out["pooled"],
        }

    def attention(self, params: Params, frozen: Params, extra: Extra, batch: Batch, mode: str) -> jax.Array:
        """[R, L] float32 weight of each patch within its slide; 0 on padding."""
        del frozen
        _check_mode(mode)
        encode = functools.partial(self.slide_net.apply, {"params": params[SLIDE]}, method="encode")
        weights = encode(_graphs(batch), self.codes(params, extra)).attention
        return weights.reshape(batch["segment_ids"].shape).astype(jnp.float32)


def _seed(key: jax.Array | None, number: int) -> jax.Array | None:
    # It depends on the network only, so that leaving one out changes nothing in the others.
    return None if key is None else jax.random.bits(jax.random.fold_in(key, number), (), jnp.uint32)


def _graphs(batch: Batch) -> Graphs:
    missing = [f for f in (*_GRAPH_FIELDS, "weight") if f not in batch]
    if missing:
        raise ValueError(f"the batch has no {missing}; present: {sorted(batch)}. Check the data set and the mode")
    return Graphs(*(batch[f] for f in _GRAPH_FIELDS), num_slots=batch["weight"].shape[0])


def _genes(batch: Batch) -> jax.Array:
    """Genes, zeroed where a slide has none so that NaN placeholders cannot leak into gradients."""
    if "genes" not in batch:
        raise ValueError(f"the batch has no genes; present: {sorted(batch)}. Check the data set, or genes.kind='none'")
    return jnp.where(batch["has_genes"][:, None], batch["genes"], 0.0) if "has_genes" in batch else batch["genes"]


def _patch_labels(segment_ids: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(class of the slide of each patch, 0 on padding [N] int32; which patches are real [N] bool)."""
    labels = jnp.concatenate([jnp.zeros(1, jnp.int32), batch["label"].astype(jnp.int32)])
    return labels[segment_ids], segment_ids > 0


def _check_mode(mode: str) -> None:
    if mode != PATHOLOGY:
        raise ValueError(f"mode {mode!r} is not available; MoMKD predicts from slides alone, in mode {PATHOLOGY!r}")


def _validate_data(config: ml_collections.ConfigDict, data: DataSpec) -> None:
    if config.data.feat_dim and data.feat_dim != config.data.feat_dim:
        raise ValueError(
            f"the data set holds embeddings of width {data.feat_dim}, but data.feat_dim = {config.data.feat_dim}: "
            "set data.feat_dim to the width of the patch encoder, or to 0 to take it from the data"
        )


def make_run(config: ml_collections.ConfigDict, data: DataSpec) -> MoMkd:
    """The networks and functions behind `make_method`, with the inner results that a `Method` does not name.

    Args:
      config: with the keys of `default_config`.
      data: widths; `num_genes = 0` for a data set without genes.

    Raises:
      ValueError: as `make_method`.
    """
    validate(config)
    _validate_data(config, data)
    stored = config.memory
    return MoMkd(
        network_spec(config, data.feat_dim, data.num_genes, data.num_classes),
        objective_spec(config),
        update=stored.update_by,
        momentum=stored.momentum,
        move_codes=config.commit.move_codes,
        align_tau=config.align.tau,
        pool_size=stored.kmeans_pool if stored.init == KMEANS else 0,
        iterations=stored.kmeans_iterations,
        renormalise=stored.renormalise,
    )


def make_method(config: ml_collections.ConfigDict, data: DataSpec) -> Method:
    """Builds MoMKD.

    Args:
      config: with the keys of `default_config`.
      data: widths; `num_genes = 0` for a data set without genes, on which the method predicts, or trains with
        `loss.alpha_gene = loss.lambda_rec = 0`.

    Returns:
      The method.

    Raises:
      ValueError: on an unknown or contradictory switch, or a width that does not match.
    """
    run = make_run(config, data)
    deployed = tuple(group for group in run.groups() if group != GENES)
    undecayed = () if config.memory.weight_decay or MEMORY not in run.groups() else (MEMORY,)
    genes = ("genes",) if run.spec.num_genes else ()
    return Method(
        name="momkd",
        init=run.init,
        forward=run.forward,
        objective=run.objective,
        predict=run.predict,
        attention=run.attention,
        prepare=run.prepare if run.pool_size else None,
        after_update=run.after_update if run.renormalise else None,
        modes=(Mode(PATHOLOGY, deployed, ("weight", *_GRAPH_FIELDS)),),
        stages=(Stage(objectives.TRAIN, run.groups(), (PATHOLOGY,), undecayed=undecayed),),
        requires=(*_GRAPH_FIELDS, "weight", "label", *genes),
        # A step of the reference is one slide: it must hold exactly train.b.
        batch_coupled=True,
        least_slides=1,
        traced=tuple(objectives.TRACED),
    )
