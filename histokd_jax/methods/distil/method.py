"""Distillation with named terms as a `Method`: two supervised networks, connectors, and terms of the catalogue."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections

from histokd_jax.methods import terms as compositions
from histokd_jax.methods.distil import objective as objectives
from histokd_jax.methods.distil.config import (
    GROUPS,
    TWO_STAGE,
    as_supervised,
    default_config,
    objective_spec,
    renamed,
    validate,
    validate_task,
)
from histokd_jax.methods.distil.objective import ONLINE_STAGE, STUDENT, STUDENT_STAGE, TEACHER, TEACHER_STAGE
from histokd_jax.methods.supervised import method as supervised
from histokd_jax.types import Batch, DataSpec, Extra, Method, Mode, Outputs, Params, Stage

__all__ = ["default_config", "make_method", "validate"]

CONNECTORS = "connectors"
_TEACHER_STREAM, _CONNECTOR_STREAM = 0x7EAC, 0xC0EC
_VIEWS = ("logits", "embedding")


@dataclasses.dataclass(frozen=True)
class _Distil:
    """The networks and terms of one run; its methods are the pure functions of the `Method`.

    Attributes:
      networks: "student" and "teacher" -> the supervised method of this network.
      objective_spec: terms and weights of the loss.
      data: widths of the data.
    """

    networks: Mapping[str, Method]
    objective_spec: objectives.ObjectiveSpec
    data: DataSpec

    def init(self, key: jax.Array) -> tuple[Params, Extra]:
        """Initial parameters, float32; the student's are those of a supervised run with the same key."""
        params = {n: m.init(_network_key(key, n))[0][supervised.GROUP] for n, m in self.networks.items()}
        if self.objective_spec.terms:
            shapes = [self._view_shapes(n, params) for n in GROUPS]
            own_key = jax.random.fold_in(key, _CONNECTOR_STREAM)
            params[CONNECTORS] = compositions.init_connectors(own_key, self.objective_spec.terms, *shapes)
        return params, {}

    def forward(
        self,
        params: Params,
        frozen: Params,
        extra: Extra,
        batch: Batch,
        key: jax.Array | None,
        train: bool,
        stage: str = ONLINE_STAGE,
    ) -> tuple[Outputs, Extra]:
        """Outputs of the networks that a stage needs, and what its terms compare.

        Args:
          params: {"student", "teacher", "connectors"}.
          frozen: not used.
          extra: passed through.
          batch: with the fields in `Method.requires`.
          key: seeds the dropout masks; may be None if not `train`.
          train: whether dropout is on.
          stage: in "student" the teacher, being frozen, runs without dropout; in "teacher" it runs alone.

        Returns:
          (outputs, extra).
        """
        del frozen
        found: dict[str, Outputs] = {}
        for name, network in self.networks.items():
            if stage == TEACHER_STAGE and name == STUDENT:
                continue
            quiet = not train or name not in objectives.TRAINED[stage]
            own_key = None if quiet or key is None else _network_key(key, name)
            found[name], _ = network.forward(_own(params, name), {}, {}, batch, own_key, not quiet)
        outputs = {k: v for name, own in found.items() for k, v in objectives.named(name, own).items()}
        return outputs | self._links(params, found, batch, stage), extra

    def _links(self, params: Params, found: Mapping[str, Outputs], batch: Batch, stage: str) -> dict[str, jax.Array]:
        terms = self.objective_spec.terms
        if stage == TEACHER_STAGE or not terms:
            return {}
        # Zeros before the connectors: garbage in a slot without a teacher must not reach their gradients.
        where = objectives.taught(self.objective_spec, batch)[:, None]
        views = [{v: jnp.where(where, found[n][v], 0.0) for v in _VIEWS} for n in GROUPS]
        links = compositions.connect(terms, params[CONNECTORS], *views, online=stage == ONLINE_STAGE)
        return objectives.packed_links(links, batch["weight"].shape[0])

    def objective(
        self,
        outputs: Outputs,
        batch: Batch,
        step: jax.Array | int = 0,
        stage: str = ONLINE_STAGE,
        values: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict]:
        """Scalar loss and metrics, see `distil.objective`; `values` as in `Method.objective`."""
        spec = self.objective_spec if values is None else self.objective_spec.with_values(values)
        return objectives.objective(spec, outputs, batch, step, stage)

    def predict(
        self, params: Params, frozen: Params, extra: Extra, batch: Batch, mode: str, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Predictions of one deployment mode; reads only the parameters and fields that the mode names.

        Args:
          params: the groups of `Method.mode(mode).params`; others, and the connectors, may be absent.
          frozen: not used.
          extra: not used.
          batch: the fields of `Method.mode(mode).fields`; others may be absent.
          mode: "pathology", or "teacher" with or without genes.
          key: not used.

        Returns:
          As the supervised method: "logits" [S, C], "embedding" [S, H], and "prob" [S, C], or "risk" and "hazards".
        """
        del frozen, extra, key
        name = self._network(mode)
        own = self.networks[name]
        return own.predict(_own(params, name), {}, {}, batch, own.modes[0].name)

    def attention(self, params: Params, frozen: Params, extra: Extra, batch: Batch, mode: str) -> jax.Array:
        """[R, L] attention of each patch within its slide, of the network of `mode`; 0 on padding."""
        del frozen, extra
        name = self._network(mode)
        own = self.networks[name]
        return own.attention(_own(params, name), {}, {}, batch, own.modes[0].name)

    def modes(self) -> tuple[Mode, ...]:
        """One deployment mode per network, the student's first; a teacher that reads slides alone is "teacher"."""
        found = [dataclasses.replace(self.networks[n].modes[0], params=(n,)) for n in GROUPS]
        if found[0].name == found[1].name:
            found[1] = dataclasses.replace(found[1], name=TEACHER)
        return tuple(found)

    def requires(self) -> tuple[str, ...]:
        """Batch fields that training needs, every one once."""
        return tuple(dict.fromkeys(field for network in self.networks.values() for field in network.requires))

    def _network(self, mode: str) -> str:
        known = {m.name: m.params[0] for m in self.modes()}
        if mode not in known:
            raise ValueError(f"mode {mode!r} is not available in this run; it has {list(known)}")
        return known[mode]

    def _view_shapes(self, name: str, params: Params) -> dict[str, tuple[int, ...]]:
        """View -> shape without the slot axis; nothing is computed."""
        network = self.networks[name]
        batch = _example_batch(self.data, network.requires)
        run = lambda p: network.forward(p, {}, {}, batch, None, False)[0]  # noqa: E731
        outputs = jax.eval_shape(run, {supervised.GROUP: params[name]})
        return {view: outputs[view].shape[1:] for view in _VIEWS}


def _example_batch(data: DataSpec, fields: tuple[str, ...]) -> dict[str, jax.Array]:
    n = jax.device_count()
    ids = jnp.ones((n, n), jnp.int32)
    batch = {"patches": jnp.zeros((n, n, data.feat_dim)), "segment_ids": ids, "positions": ids, "clusters": ids}
    batch |= {"genes": jnp.zeros((1, data.num_genes)), "weight": jnp.ones(1)}
    return {name: value for name, value in batch.items() if name in fields}


def _network_key(key: jax.Array, name: str) -> jax.Array:
    """The student's key is that of a supervised run, so that it starts, and drops out, alike with any teacher."""
    return key if name == STUDENT else jax.random.fold_in(key, _TEACHER_STREAM)


def _own(params: Params, name: str) -> Params:
    """The parameters of one network as its supervised method knows them."""
    if name not in params:
        raise ValueError(f"parameters of {name!r} are needed but absent; present: {sorted(params)}")
    return {supervised.GROUP: params[name]}


def _stages(config: ml_collections.ConfigDict, groups: tuple[str, ...], modes: Mapping[str, str]) -> tuple[Stage, ...]:
    taught = tuple(group for group in groups if group != TEACHER)
    if config.distill.schedule == TWO_STAGE:
        return (
            Stage(TEACHER_STAGE, (TEACHER,), (modes[TEACHER],)),
            Stage(STUDENT_STAGE, taught, (modes[STUDENT],)),
        )
    return (Stage(ONLINE_STAGE, groups, (modes[STUDENT],)),)


def make_method(config: ml_collections.ConfigDict, data: DataSpec) -> Method:
    """Builds distillation with named terms.

    Args:
      config: with the keys of `default_config`.
      data: widths, number of classes or time bins, genes and task.

    Returns:
      The method.

    Raises:
      ValueError: on an unknown or contradictory switch, widths that differ without a connector, or data that do not
        match.
    """
    validate(config)
    networks = {}
    for group in GROUPS:
        try:
            networks[group] = supervised.make_method(as_supervised(config, group), data)
        except ValueError as error:
            raise renamed(error, group) from None
    reads_genes = {group: "genes" in networks[group].requires for group in GROUPS}
    run = _Distil(networks, objective_spec(config, data.task, reads_genes), data)
    validate_task(run.objective_spec.terms, data.task, config.loss.survival)
    # Widths are known from here on: a term without its connector is refused before anything is compiled.
    jax.eval_shape(run.init, jax.random.key(0))
    modes = {mode.params[0]: mode.name for mode in run.modes()}
    groups = (*GROUPS, CONNECTORS) if run.objective_spec.terms else GROUPS
    return Method(
        name="distil",
        init=run.init,
        forward=run.forward,
        objective=run.objective,
        predict=run.predict,
        attention=run.attention,
        modes=run.modes(),
        stages=_stages(config, groups, modes),
        requires=run.requires(),
        batch_coupled=True,
        traced=run.objective_spec.traced_keys(),
    )
