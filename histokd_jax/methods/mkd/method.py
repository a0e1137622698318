"""MKD as a `Method`: parameter groups, forward pass, objective, deployment modes and training stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from histokd_jax.methods.mkd import objective as objectives
from histokd_jax.methods.mkd.config import (
    FAITHFUL,
    TWO_STAGE,
    default_config,
    network_spec,
    objective_spec,
    validate,
)
from histokd_jax.methods.mkd.networks import GENOMIC, MULTIMODAL, NETWORKS, STUDENT, NetworkSpec, build
from histokd_jax.nn.gated_attention import Bags
from histokd_jax.types import CLASSIFICATION, Batch, DataSpec, Extra, Method, Mode, Outputs, Params, Stage

__all__ = ["FAITHFUL", "TASKS", "default_config", "make_method", "validate"]

TASKS = (CLASSIFICATION,)
PATHOLOGY, BOTH, GENOMICS = "pathology", "both", "genomics"
_NETWORK_OF_MODE = {PATHOLOGY: STUDENT, BOTH: MULTIMODAL, GENOMICS: GENOMIC}
_LETTER = {STUDENT: "P", MULTIMODAL: "M", GENOMIC: "G"}
_PATCH_FIELDS = ("patches", "segment_ids", "positions")


@dataclasses.dataclass(frozen=True)
class _Mkd:
    """The networks and switches of one run; its methods are the pure functions of the `Method`.

    Attributes:
      networks: module of each parameter group.
      spec: the architecture.
      objective_spec: weights and forms of the loss terms.
      ensemble: whether a mode averages the probabilities of all networks it can run.
    """

    networks: Mapping[str, nn.Module]
    spec: NetworkSpec
    objective_spec: objectives.ObjectiveSpec
    ensemble: bool

    def init(self, key: jax.Array) -> tuple[Params, Extra]:
        """Initial parameters, float32; a network's values do not depend on which others are present."""
        bags, streams = _example_inputs(self.spec)
        params = {n: m.init(_network_key(key, n), bags, streams)["params"] for n, m in self.networks.items()}
        return params, {}

    def forward(
        self,
        params: Params,
        frozen: Params,
        extra: Extra,
        batch: Batch,
        key: jax.Array | None,
        train: bool,
        stage: str = objectives.ONLINE,
    ) -> tuple[Outputs, Extra]:
        """Embeddings and logits of every network of the run.

        Args:
          params: {"S_P", "T_M", "T_G"} without absent teachers.
          frozen: not used.
          extra: passed through.
          batch: with the fields in `Method.requires`.
          key: seeds the dropout masks; may be None if not `train`.
          train: whether dropout is on.
          stage: in the student stage of the two-stage schedule the teachers, being frozen, run without dropout.

        Returns:
          ({"P", "M", "G": [S, H], "z_P", "z_M", "z_G": [S, C]}, extra).
        """
        del frozen
        bags = _inputs(batch, _PATCH_FIELDS)
        # A student alone reads no genes, as `Method.requires` says.
        streams = _streams(self.spec, batch) if len(self.networks) > 1 else None
        outputs = {}
        for name in self.networks:
            quiet = not train or (stage == objectives.STUDENT_STAGE and name != STUDENT)
            embedding, logits = self._apply(name, params, bags, streams, None if quiet else key)
            outputs[_LETTER[name]], outputs[f"z_{_LETTER[name]}"] = embedding, logits
        return outputs, extra

    def objective(
        self,
        outputs: Outputs,
        batch: Batch,
        step: jax.Array | int = 0,
        stage: str = objectives.ONLINE,
        values: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict]:
        """Scalar loss and metrics, see `histokd_jax.methods.mkd.objective`; `values` as in `Method.objective`."""
        spec = self.objective_spec if values is None else self.objective_spec.with_values(values)
        return objectives.objective(spec, outputs, batch, step, stage)

    def predict(
        self, params: Params, frozen: Params, extra: Extra, batch: Batch, mode: str, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Predictions of one deployment mode; reads only the parameters and fields that the mode names.

        Args:
          params: the groups of `Method.mode(mode).params`; others may be absent.
          frozen: not used.
          extra: not used.
          batch: the fields of `Method.mode(mode).fields`; others may be absent.
          mode: "pathology", "both" or "genomics".
          key: if given, the teachers (never the student) draw dropout: the validation of the authors' code
            (`eval.teacher_dropout`, quirk Q1).

        Returns:
          {"prob": [S, C], "logits": [S, C], "embedding": [S, H]} in float32. With `infer.ensemble = mean_prob`, the
          probabilities are averaged over the mode's networks and the logits are their logarithms.
        """
        del frozen, extra
        main = self._network(mode)
        groups = self.groups(mode)
        bags = _inputs(batch, _PATCH_FIELDS) if any(n != GENOMIC for n in groups) else None
        streams = _streams(self.spec, batch) if any(n != STUDENT for n in groups) else None
        runs = {n: self._apply(n, params, bags, streams, None if n == STUDENT else key) for n in groups}
        embedding, logits = runs[main]
        if len(runs) == 1:
            return {"prob": jax.nn.softmax(logits, axis=-1), "logits": logits, "embedding": embedding}
        prob = sum(jax.nn.softmax(z, axis=-1) for _, z in runs.values()) / len(runs)
        return {"prob": prob, "logits": jnp.log(prob), "embedding": embedding}

    def attention(self, params: Params, frozen: Params, extra: Extra, batch: Batch, mode: str) -> jax.Array:
        """[R, L] float32 attention of each patch within its slide, of the network of `mode`; 0 on padding.

        Raises:
          ValueError: in the genomics mode, which reads no patches.
        """
        del frozen, extra
        name = self._network(mode)
        if name == GENOMIC:
            raise ValueError("mode 'genomics' reads no patches, so it has no attention map; use 'pathology' or 'both'")
        bags = _inputs(batch, _PATCH_FIELDS)
        return self.networks[name].apply({"params": params[name]}, bags, method="attention_map")

    def groups(self, mode: str) -> tuple[str, ...]:
        """Parameter groups that `mode` runs."""
        if mode == BOTH and self.ensemble:
            return tuple(self.networks)
        return (self._network(mode),)

    def _network(self, mode: str) -> str:
        name = _NETWORK_OF_MODE.get(mode)
        if name not in self.networks:
            known = [m for m, n in _NETWORK_OF_MODE.items() if n in self.networks]
            raise ValueError(f"mode {mode!r} is not available in this run; it has {known}")
        return name

    def _apply(
        self, name: str, params: Params, bags: Any, streams: Any, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        if name not in params:
            raise ValueError(f"parameters of {name!r} are needed but absent; present: {sorted(params)}")
        seed = None if key is None else jax.random.bits(_network_key(key, name), (), jnp.uint32)
        return self.networks[name].apply({"params": params[name]}, bags, streams, seed)

    def modes(self) -> tuple[Mode, ...]:
        """The deployment modes of the networks that are present."""
        genes = _gene_fields(self.spec)
        fields = {PATHOLOGY: _PATCH_FIELDS, BOTH: (*_PATCH_FIELDS, *genes), GENOMICS: genes}
        available = [mode for mode, network in _NETWORK_OF_MODE.items() if network in self.networks]
        return tuple(Mode(mode, self.groups(mode), ("weight", *fields[mode])) for mode in available)


def _network_key(key: jax.Array, name: str) -> jax.Array:
    """A key that depends on the network only, so that dropping a teacher changes nothing in the others."""
    return jax.random.fold_in(key, NETWORKS.index(name))


def _gene_fields(spec: NetworkSpec) -> tuple[str, ...]:
    return ("genes", "cnv") if spec.two_streams else ("genes",)


def _require_fields(batch: Batch, fields: tuple[str, ...]) -> None:
    missing = [f for f in fields if f not in batch]
    if missing:
        raise ValueError(f"the batch has no {missing}; present: {sorted(batch)}. Check the data set and the mode")


def _inputs(batch: Batch, fields: tuple[str, ...]) -> Bags:
    _require_fields(batch, (*fields, "weight"))
    return Bags(*(batch[f] for f in fields), num_slots=batch["weight"].shape[0])


def _streams(spec: NetworkSpec, batch: Batch) -> dict[str, jax.Array] | None:
    """Gene fields, zeroed where a slide has none so that NaN placeholders cannot leak into gradients."""
    fields = _gene_fields(spec)
    _require_fields(batch, fields)
    if "has_genes" not in batch:
        return {f: batch[f] for f in fields}
    return {f: jnp.where(batch["has_genes"][:, None], batch[f], 0.0) for f in fields}


def _example_inputs(spec: NetworkSpec) -> tuple[Bags, dict[str, jax.Array]]:
    """Inputs of the right widths; as many rows, and patches per row, as devices, so that any mesh can divide them."""
    n = jax.device_count()
    ids = jnp.ones((n, n), jnp.int32)
    bags = Bags(jnp.zeros((n, n, spec.feat_dim)), ids, jnp.zeros_like(ids), num_slots=1)
    return bags, {f: jnp.zeros((1, spec.tokens.token_size)) for f in _gene_fields(spec)}


def _stages(config: ml_collections.ConfigDict, networks: tuple[str, ...]) -> tuple[Stage, ...]:
    modes = {network: mode for mode, network in _NETWORK_OF_MODE.items()}
    teachers = tuple(n for n in networks if n != STUDENT)
    if config.distill.schedule == TWO_STAGE:
        return (
            Stage(objectives.TEACHERS_STAGE, teachers, tuple(modes[n] for n in teachers)),
            Stage(objectives.STUDENT_STAGE, (STUDENT,), (PATHOLOGY,)),
        )
    monitored = networks if config.early_stop.monitor == "mean_auc3" else (STUDENT,)
    return (Stage(objectives.ONLINE, networks, tuple(modes[n] for n in monitored)),)


def _validate_data(config: ml_collections.ConfigDict, data: DataSpec) -> None:
    if config.data.feat_dim and data.feat_dim != config.data.feat_dim:
        raise ValueError(
            f"the data set holds embeddings of width {data.feat_dim}, but data.feat_dim = {config.data.feat_dim}: "
            "set data.feat_dim to the width of the patch encoder, or to 0 to take it from the data"
        )
    if data.num_classes < 2:
        raise ValueError(f"classification needs at least 2 classes, the data set has {data.num_classes}")
    if data.num_genes and data.num_genes % config.genes.token_size:
        raise ValueError(
            f"{data.num_genes} selected genes are not divisible by genes.token_size = {config.genes.token_size}: "
            "choose genes.top_k as a multiple that the gene table can fill"
        )


def make_method(config: ml_collections.ConfigDict, data: DataSpec) -> Method:
    """Builds MKD, or its journal variant GMKDN.

    Args:
      config: with the keys of `default_config`.
      data: widths and class count; `num_genes = 0` for a data set without genes, where only the pathology mode runs.

    Returns:
      The method. `forward` accepts an additional `stage` and `predict` an additional `key`, both optional.

    Raises:
      ValueError: on an unknown or contradictory switch, or a width that does not match.
    """
    validate(config)
    _validate_data(config, data)
    spec = network_spec(config, data.feat_dim, data.num_classes)
    networks = build(spec, tuple(config.teachers))
    run = _Mkd(networks, spec, objective_spec(config), ensemble=config.infer.ensemble == "mean_prob")
    genes = _gene_fields(spec) if config.teachers else ()
    return Method(
        name="mkd",
        init=run.init,
        forward=run.forward,
        objective=run.objective,
        predict=run.predict,
        attention=run.attention,
        modes=run.modes(),
        stages=_stages(config, tuple(networks)),
        requires=(*_PATCH_FIELDS, "weight", "label", *genes),
        batch_coupled=bool(run.objective_spec.weights()),
        traced=tuple(objectives.TRACED),
    )
