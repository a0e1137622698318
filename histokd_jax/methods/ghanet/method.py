"""G-HANet as a `Method`: parameter groups, forward pass, objective, deployment from a bag alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from histokd_jax import losses
from histokd_jax.methods.ghanet import objective as objectives
from histokd_jax.methods.ghanet.config import FAITHFUL, default_config, network_spec, objective_spec, validate
from histokd_jax.methods.ghanet.networks import CAB, HEADS, HSB, NETWORKS, build
from histokd_jax.methods.ghanet.spec import NetworkSpec
from histokd_jax.nn.gated_attention import Bags
from histokd_jax.types import SURVIVAL, Batch, DataSpec, Extra, Method, Mode, Outputs, Params, Stage

__all__ = ["CONTROL", "FAITHFUL", "PATHOLOGY", "GHanet", "default_config", "make_method", "make_run", "validate"]

CONTROL = {"loss.rec_weight": 0.0}
"""The same network without genes: what any claim of benefit must beat (section 9)."""
PATHOLOGY = "pathology"
_PATCH_FIELDS = ("patches", "segment_ids", "positions")


@dataclasses.dataclass(frozen=True)
class GHanet:
    """The networks and switches of one run; its methods are the pure functions of the `Method`.

    Attributes:
      networks: module of each parameter group.
      spec: the architecture.
      objective_spec: weights and forms of the loss terms.
    """

    networks: Mapping[str, nn.Module]
    spec: NetworkSpec
    objective_spec: objectives.ObjectiveSpec

    def init(self, key: jax.Array) -> tuple[Params, Extra]:
        """Initial parameters, float32; a network's values do not depend on which others are present."""
        # A multiple of the devices in rows and patches per row, so that any mesh can divide them; enough to keep one.
        n = jax.device_count()
        length = n * (1 + math.ceil(1.0 / self.spec.ratio))
        ids = jnp.ones((n, length), jnp.int32)
        bags = Bags(jnp.zeros((n, length, self.spec.feat_dim)), ids, jnp.zeros_like(ids), num_slots=1)
        tokens = jnp.zeros((1, self.spec.tokens, self.spec.width))
        values = jnp.zeros((self.spec.tokens, n, length))
        inputs = {CAB: (bags,), HEADS: (tokens,), HSB: (bags, tokens, values)}
        keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(NETWORKS)}
        return {n: m.init(keys[n], *inputs[n])["params"] for n, m in self.networks.items()}, {}

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
        """Logits, embedding and reconstructions; reads the patches only.

        Args:
          params: {"CAB", "HEADS", "HSB"}.
          frozen: not used.
          extra: passed through.
          batch: patch fields and "weight".
          key: seeds the dropout masks; may be None if not `train`.
          train: whether dropout is on.
          stage: not used; there is one.

        Returns:
          ({"logits": [S, C], "embedding": [S, E], "reconstruction": [S, K]}, extra); no reconstruction without heads.
        """
        del frozen, stage
        outputs = self.details(params, batch, key if train else None)
        names = ("logits", "embedding", "reconstruction")
        return {name: outputs[name] for name in names if name in outputs}, extra

    def details(self, params: Params, batch: Batch, key: jax.Array | None = None) -> dict[str, jax.Array]:
        """All slot-level results of a forward pass.

        Returns:
          {"logits", "embedding", "reconstruction", "tokens" (R), "pooled" (A), "hyper" (Y)}, what exists of it.
        """
        bags = _bags(batch)
        tokens, values = self._apply(CAB, params, key, bags) if CAB in self.networks else (None, None)
        outputs = {} if tokens is None else {"tokens": tokens}
        if HEADS in self.networks and HEADS in params:
            outputs["reconstruction"] = self._apply(HEADS, params, key, tokens)
        shown = jax.lax.stop_gradient(tokens) if self.spec.detach_tokens else tokens
        return outputs | self._apply(HSB, params, key, bags, shown, values)

    def objective(
        self,
        outputs: Outputs,
        batch: Batch,
        step: jax.Array | int = 0,
        stage: str = objectives.TRAIN,
        values: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict]:
        """Scalar loss and metrics, see `histokd_jax.methods.ghanet.objective`; `values` as in `Method.objective`."""
        spec = self.objective_spec if values is None else self.objective_spec.with_values(values)
        return objectives.objective(spec, outputs, batch, step, stage)

    def predict(
        self, params: Params, frozen: Params, extra: Extra, batch: Batch, mode: str, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Predictions from the patches alone; no gene is read, and the reconstruction heads may be absent.

        Args:
          params: {"CAB", "HSB"}.
          frozen: not used.
          extra: not used.
          batch: patch fields and "weight".
          mode: "pathology".
          key: not used; there is no teacher.

        Returns:
          {"risk": [S], "hazards": [S, C], "survival": [S, C], "logits", "embedding"}, at least float32. The risk is
          minus the sum of the survival curve; with a Cox head it is the logit, and C = 0.
        """
        del frozen, extra, key
        self._check_mode(mode)
        deployed = {name: params[name] for name in self.deployed() if name in params}
        out = self.details(deployed, batch)
        logits = out["logits"]
        found = {"logits": logits, "embedding": out["embedding"]}
        if self.objective_spec.survival == objectives.COX:
            return found | {"risk": logits[:, 0], "hazards": logits[:, :0], "survival": logits[:, :0]}
        return found | {
            "risk": losses.risk_score(logits),
            "hazards": jax.nn.sigmoid(logits),
            "survival": losses.survival_curve(logits),
        }

    def attention(self, params: Params, frozen: Params, extra: Extra, batch: Batch, mode: str) -> jax.Array:
        """[R, L] float32: mean over tokens of the pool weights G; sums to 1 over a slide, 0 on padding."""
        del frozen, extra
        self._check_mode(mode)
        return jnp.mean(self.patch_weights(params, batch)["G"], axis=0).astype(jnp.float32)

    def patch_weights(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """The maps over patches, without dropout.

        Args:
          params: {"CAB", "HSB"}.
          batch: patch fields and "weight".

        Returns:
          {"M": [T, R, L] map of CAB, "P": [1, R, L] morphology weights, "Q": [T, R, L] genotype weights, "G": [T, R, L]
          their mean}, what exists of it; rows of P, Q and G sum to 1 over a slide, and all are 0 on padding.
        """
        bags, values = _bags(batch), None
        maps = {}
        if CAB in self.networks and self.spec.reads_map:
            values = self._apply(CAB, params, None, bags)[1]
            maps["M"] = values
        return maps | self.networks[HSB].apply({"params": params[HSB]}, bags, values, method="weights")

    def deployed(self) -> tuple[str, ...]:
        """Parameter groups that the pathology mode runs."""
        return tuple(name for name in self.networks if name != HEADS)

    def _check_mode(self, mode: str) -> None:
        if mode != PATHOLOGY:
            raise ValueError(
                f"mode {mode!r} is not available; G-HANet predicts from slides alone, in mode {PATHOLOGY!r}"
            )

    def _apply(self, name: str, params: Params, key: jax.Array | None, *inputs: Any) -> Any:
        if name not in params:
            raise ValueError(f"parameters of {name!r} are needed but absent; present: {sorted(params)}")
        # The seed depends on the network only, so that leaving one out changes nothing in the others.
        folded = None if key is None else jax.random.fold_in(key, NETWORKS.index(name))
        seed = None if key is None else jax.random.bits(folded, (), jnp.uint32)
        return self.networks[name].apply({"params": params[name]}, *inputs, seed)


def _bags(batch: Batch) -> Bags:
    missing = [f for f in (*_PATCH_FIELDS, "weight") if f not in batch]
    if missing:
        raise ValueError(f"the batch has no {missing}; present: {sorted(batch)}. Check the data set and the mode")
    return Bags(*(batch[f] for f in _PATCH_FIELDS), num_slots=batch["weight"].shape[0])


def _validate_data(config: ml_collections.ConfigDict, data: DataSpec) -> None:
    if config.data.feat_dim and data.feat_dim != config.data.feat_dim:
        raise ValueError(
            f"the data set holds embeddings of width {data.feat_dim}, but data.feat_dim = {config.data.feat_dim}: "
            "set data.feat_dim to the width of the patch encoder, or to 0 to take it from the data"
        )
    if data.task != SURVIVAL:
        raise ValueError(f"G-HANet predicts survival, but the task of the data is {data.task!r}: set the survival task")
    if config.loss.survival != objectives.COX and data.num_classes < 2:
        raise ValueError(f"discrete hazards need at least 2 time bins, the data set has {data.num_classes}")
    if data.gene_groups and len(data.gene_groups) != config.model.tokens:
        raise ValueError(
            f"model.tokens = {config.model.tokens}, but there are {len(data.gene_groups)} gene groups: every group has "
            "its own token; set model.tokens to the number of groups"
        )
    if sum(data.gene_groups) != data.num_genes:
        raise ValueError(f"the gene groups {data.gene_groups} must sum to num_genes = {data.num_genes}")


def make_run(config: ml_collections.ConfigDict, data: DataSpec) -> GHanet:
    """The networks and functions behind `make_method`, with the maps and inner results that a `Method` does not name.

    Args:
      config: with the keys of `default_config`.
      data: widths, time bins and sizes of the gene groups.

    Raises:
      ValueError: as `make_method`.
    """
    validate(config)
    _validate_data(config, data)
    groups = tuple(data.gene_groups)
    outputs = 1 if config.loss.survival == objectives.COX else data.num_classes
    spec = network_spec(config, data.feat_dim, outputs, groups)
    return GHanet(build(spec), spec, objective_spec(config, groups))


def make_method(config: ml_collections.ConfigDict, data: DataSpec) -> Method:
    """Builds G-HANet.

    Args:
      config: with the keys of `default_config`.
      data: widths, time bins and sizes of the gene groups; without groups (a data set without genes) the method
        predicts, or trains with `loss.rec_weight = 0`.

    Returns:
      The method.

    Raises:
      ValueError: on an unknown or contradictory switch, or a width that does not match.
    """
    run = make_run(config, data)
    genes = ("genes",) if run.objective_spec.reconstructs else ()
    return Method(
        name="ghanet",
        init=run.init,
        forward=run.forward,
        objective=run.objective,
        predict=run.predict,
        attention=run.attention,
        modes=(Mode(PATHOLOGY, run.deployed(), ("weight", *_PATCH_FIELDS)),),
        stages=(Stage(objectives.TRAIN, tuple(run.networks), (PATHOLOGY,)),),
        requires=(*_PATCH_FIELDS, "weight", "label", "time_months", "event", *genes),
        # A step is the accumulation window of the reference: it must hold exactly train.b patients.
        batch_coupled=True,
        traced=tuple(objectives.TRACED),
    )
