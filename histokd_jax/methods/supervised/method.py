"""The supervised baselines as a `Method`: one parameter group, one stage, one deployment mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from histokd_jax.losses.survival import risk_score
from histokd_jax.methods.supervised import objective as objectives
from histokd_jax.methods.supervised.config import default_config, network_spec, objective_spec, selected, validate
from histokd_jax.methods.supervised.networks import CLUSTERS, GENES, PATCHES, NetworkSpec
from histokd_jax.nn.gated_attention import Bags
from histokd_jax.nn.mil.clustered import ClusteredBags
from histokd_jax.nn.mil.redraw import redraw
from histokd_jax.types import SURVIVAL, Batch, DataSpec, Extra, Method, Mode, Outputs, Params, Stage

__all__ = ["default_config", "make_method", "validate"]

GROUP, STAGE = "network", "supervised"
_PATCH_FIELDS = ("patches", "segment_ids", "positions")


@dataclasses.dataclass(frozen=True)
class _Supervised:
    """The network and switches of one run; its methods are the pure functions of the `Method`.

    Attributes:
      network: the module, see `networks` for the convention.
      reads: what it reads.
      spec: widths and outputs.
      objective_spec: terms and weights of the loss.
      initializer: None, or the rule by which all kernels are drawn anew.
      l1: top-level parameter names under the L1 term; () for all.
      average_max: whether probabilities are averaged over bag and maximum logits.
    """

    network: nn.Module
    reads: tuple[str, ...]
    spec: NetworkSpec
    objective_spec: objectives.ObjectiveSpec
    initializer: str | None
    l1: tuple[str, ...]
    average_max: bool

    def init(self, key: jax.Array) -> tuple[Params, Extra]:
        """Initial parameters {"network": ...}, float32."""
        params = self.network.init(key, *_example_inputs(self.spec, self.reads))["params"]
        if self.initializer is not None:
            params = redraw(params, jax.random.fold_in(key, 1), self.initializer)
        return {GROUP: params}, {}

    def forward(
        self,
        params: Params,
        frozen: Params,
        extra: Extra,
        batch: Batch,
        key: jax.Array | None,
        train: bool,
        stage: str = STAGE,
    ) -> tuple[Outputs, Extra]:
        """Everything the network returns, and "l1" [S], the sum of absolute parameters in every slot.

        Args:
          params: {"network": ...}.
          frozen: not used.
          extra: passed through.
          batch: with the fields in `Method.requires`.
          key: seeds the dropout masks; may be None if not `train`.
          train: whether dropout is on.
          stage: not used; there is one.

        Returns:
          (outputs, extra).
        """
        del frozen, stage
        seed = jax.random.bits(key, (), jnp.uint32) if train and key is not None else None
        outputs = self._apply(params, batch, seed)
        penalty = _absolute_sum(params[GROUP], self.l1)
        return {**outputs, objectives.L1: jnp.broadcast_to(penalty, batch["weight"].shape)}, extra

    def objective(
        self,
        outputs: Outputs,
        batch: Batch,
        step: jax.Array | int = 0,
        stage: str = STAGE,
        values: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict]:
        """Scalar loss and metrics, see `supervised.objective`; `values` as in `Method.objective`."""
        spec = self.objective_spec if values is None else self.objective_spec.with_values(values)
        return objectives.objective(spec, outputs, batch, step, stage)

    def predict(
        self, params: Params, frozen: Params, extra: Extra, batch: Batch, mode: str, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Predictions; reads only the parameters and fields that the mode names.

        Args:
          params: {"network": ...}.
          frozen: not used.
          extra: not used.
          batch: the fields of `Method.mode(mode).fields`; others may be absent.
          mode: the mode of this network.
          key: not used; there are no teachers.

        Returns:
          "logits" [S, C] and "embedding" [S, H]; "prob" [S, C] of a classification, "risk" [S] and "hazards" [S, C]
          (C = 0 with a Cox head) of a survival task.
        """
        del frozen, extra, key
        self._check_mode(mode)
        outputs = self._apply(params, batch, None)
        logits = outputs["logits"]
        found = {"logits": logits, "embedding": outputs["embedding"]}
        if self.objective_spec.task != SURVIVAL:
            return {**found, "prob": self._probabilities(outputs)}
        if self.objective_spec.survival == objectives.COX:
            return {**found, "risk": logits[:, 0], "hazards": logits[:, :0]}
        return {**found, "risk": risk_score(logits), "hazards": jax.nn.sigmoid(logits)}

    def attention(self, params: Params, frozen: Params, extra: Extra, batch: Batch, mode: str) -> jax.Array:
        """[R, L] attention of each patch within its slide; 0 on padding.

        Raises:
          ValueError: for a network that reads no patches or has no attention.
        """
        del frozen, extra
        self._check_mode(mode)
        if not hasattr(self.network, "attention_map"):
            raise ValueError(f"{type(self.network).__name__} has no attention map")
        bags, genes = _inputs(batch, self.reads)
        return self.network.apply({"params": params[GROUP]}, bags, genes, method="attention_map")

    def mode(self) -> Mode:
        """The deployment mode, named after what the network reads."""
        fields = ("weight", *_fields(self.reads))
        if PATCHES not in self.reads:
            return Mode("genomics", (GROUP,), fields)
        return Mode("both" if GENES in self.reads else "pathology", (GROUP,), fields)

    def _check_mode(self, mode: str) -> None:
        if mode != self.mode().name:
            raise ValueError(f"mode {mode!r} is not available in this run; it has [{self.mode().name!r}]")

    def _apply(self, params: Params, batch: Batch, seed: jax.Array | None) -> dict[str, jax.Array]:
        if GROUP not in params:
            raise ValueError(f"parameters of {GROUP!r} are needed but absent; present: {sorted(params)}")
        return self.network.apply({"params": params[GROUP]}, *_inputs(batch, self.reads), seed)

    def _probabilities(self, outputs: Outputs) -> jax.Array:
        if self.objective_spec.classification != objectives.BCE:
            return jax.nn.softmax(outputs["logits"], axis=-1)
        prob = jax.nn.sigmoid(outputs["logits"])
        if self.average_max and objectives.MAX_LOGITS in outputs:
            return (prob + jax.nn.sigmoid(outputs[objectives.MAX_LOGITS])) / 2.0
        return prob


def _absolute_sum(params: Mapping[str, Any], names: tuple[str, ...]) -> jax.Array:
    chosen = {n: params[n] for n in names} if names else params
    # The derivative of jnp.abs at 0 is 1; biases start there and would be pushed off by the penalty itself.
    return sum(jnp.sum(leaf * jax.lax.stop_gradient(jnp.sign(leaf))) for leaf in jax.tree.leaves(chosen))


def _fields(reads: tuple[str, ...]) -> tuple[str, ...]:
    patches = _PATCH_FIELDS if PATCHES in reads else ()
    return (*patches, *(field for field in (CLUSTERS, GENES) if field in reads))


def _inputs(batch: Batch, reads: tuple[str, ...]) -> tuple[Bags | ClusteredBags | None, dict[str, jax.Array] | None]:
    """(bags, genes) as the convention says; genes of slides without any are 0, so that NaN cannot leak."""
    fields = ("weight", *_fields(reads))
    missing = [f for f in fields if f not in batch]
    if missing:
        raise ValueError(f"the batch has no {missing}; present: {sorted(batch)}. Check the data set and the mode")
    bags = genes = None
    if PATCHES in reads:
        bags = Bags(*(batch[f] for f in _PATCH_FIELDS), num_slots=batch["weight"].shape[0])
        if CLUSTERS in reads:
            bags = ClusteredBags(*bags, clusters=batch[CLUSTERS])
    if GENES in reads:
        genes = {GENES: batch[GENES]}
        if "has_genes" in batch:
            genes = {GENES: jnp.where(batch["has_genes"][:, None], batch[GENES], 0.0)}
    return bags, genes


def _example_inputs(spec: NetworkSpec, reads: tuple[str, ...]) -> tuple[Any, Any, None]:
    """Inputs of the right widths; as many rows, and patches per row, as devices, so that any mesh can divide them."""
    n = jax.device_count()
    ids = jnp.ones((n, n), jnp.int32)
    zeros = jnp.zeros_like(ids)
    batch = {"patches": jnp.zeros((n, n, spec.feat_dim)), "segment_ids": ids, "positions": zeros, CLUSTERS: zeros}
    batch |= {GENES: jnp.zeros((1, spec.num_genes)), "weight": jnp.ones(1)}
    return (*_inputs(batch, reads), None)


def _validate_data(config: ml_collections.ConfigDict, data: DataSpec, reads: tuple[str, ...]) -> None:
    if PATCHES in reads and config.data.feat_dim and data.feat_dim != config.data.feat_dim:
        raise ValueError(
            f"the data set holds embeddings of width {data.feat_dim}, but data.feat_dim = {config.data.feat_dim}: "
            "set data.feat_dim to the width of the patch encoder, or to 0 to take it from the data"
        )
    if data.num_classes < 2:
        raise ValueError(f"{data.task} needs at least 2 classes or time bins, the data set has {data.num_classes}")
    if GENES in reads and not data.num_genes:
        raise ValueError(
            f"model.name = {config.model.name!r} with these options reads molecular features, but the data set has none"
        )


def make_method(config: ml_collections.ConfigDict, data: DataSpec) -> Method:
    """Builds one supervised baseline.

    Args:
      config: with the keys of `default_config`.
      data: widths, number of classes or time bins, and task.

    Returns:
      The method.

    Raises:
      ValueError: on an unknown or contradictory switch, or a width that does not match.
    """
    validate(config)
    entry, options = selected(config)
    reads = tuple(entry.reads(options))
    _validate_data(config, data, reads)
    spec = network_spec(config, data)
    run = _Supervised(
        network=entry.build(spec, options),
        reads=reads,
        spec=spec,
        objective_spec=objective_spec(config, data.task, GENES in reads),
        initializer=entry.initializer(options),
        l1=entry.l1,
        average_max=config.infer.average_max,
    )
    mode = run.mode()
    outcome = ("time_months", "event") if data.task == SURVIVAL else ()
    return Method(
        name="supervised",
        init=run.init,
        forward=run.forward,
        objective=run.objective,
        predict=run.predict,
        attention=run.attention,
        modes=(mode,),
        stages=(Stage(STAGE, (GROUP,), (mode.name,)),),
        requires=(*_fields(reads), "weight", "label", *outcome),
        # The published recipes accumulate an exact number of bags per update.
        batch_coupled=True,
        traced=tuple(objectives.TRACED),
        # Only risk sets compare slides; SurvPath updates after every bag.
        least_slides=2 if data.task == SURVIVAL and config.loss.survival == objectives.COX else 1,
    )
