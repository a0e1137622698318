"""Survival distillation as a `Method`: two supervised networks, of which the student also learns from the teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import ml_collections

from histokd_jax.methods.supervised import method as supervised
from histokd_jax.methods.survival_kd import objective as objectives
from histokd_jax.methods.survival_kd.config import (
    CACHED,
    TWO_STAGE,
    as_supervised,
    default_config,
    groups,
    objective_spec,
    renamed,
    validate,
)
from histokd_jax.methods.survival_kd.objective import ONLINE_STAGE, STUDENT, STUDENT_STAGE, TEACHER, TEACHER_STAGE
from histokd_jax.types import SURVIVAL, Batch, DataSpec, Extra, Method, Mode, Outputs, Params, Stage

__all__ = ["TASKS", "default_config", "make_method", "validate"]

TASKS = (SURVIVAL,)
_TEACHER_STREAM = 0x7EAC


@dataclasses.dataclass(frozen=True)
class _SurvivalKd:
    """The networks and switches of one run; its methods are the pure functions of the `Method`.

    Attributes:
      networks: "student", and "teacher" unless it is cached -> the supervised method of this network.
      objective_spec: terms and weights of the loss.
    """

    networks: Mapping[str, Method]
    objective_spec: objectives.ObjectiveSpec

    def init(self, key: jax.Array) -> tuple[Params, Extra]:
        """Initial parameters, float32; the student's are those of a supervised run with the same key."""
        return {n: m.init(_network_key(key, n))[0][supervised.GROUP] for n, m in self.networks.items()}, {}

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
        """Outputs of the networks that a stage needs, named "student_logits" and so on.

        Args:
          params: {"student", "teacher"}; no teacher in the cached schedule.
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
        outputs = {}
        for name, network in self.networks.items():
            if stage == TEACHER_STAGE and name == STUDENT:
                continue
            quiet = not train or name not in objectives.TRAINED[stage]
            own_key = None if quiet or key is None else _network_key(key, name)
            found, _ = network.forward(_own(params, name), {}, {}, batch, own_key, not quiet)
            outputs |= objectives.named(name, found)
        return outputs, extra

    def objective(
        self,
        outputs: Outputs,
        batch: Batch,
        step: jax.Array | int = 0,
        stage: str = ONLINE_STAGE,
        values: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict]:
        """Scalar loss and metrics, see `survival_kd.objective`; `values` as in `Method.objective`."""
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
          mode: "pathology", or the mode of the teacher.
          key: not used.

        Returns:
          "logits" [S, C], "embedding" [S, H], "risk" [S] and "hazards" [S, C] (C = 0 with a Cox head).
        """
        del frozen, extra, key
        name = self._network(mode)
        return self.networks[name].predict(_own(params, name), {}, {}, batch, mode)

    def attention(self, params: Params, frozen: Params, extra: Extra, batch: Batch, mode: str) -> jax.Array:
        """[R, L] attention of each patch within its slide, of the network of `mode`; 0 on padding.

        Raises:
          ValueError: for a network that reads no patches or has no attention.
        """
        del frozen, extra
        name = self._network(mode)
        return self.networks[name].attention(_own(params, name), {}, {}, batch, mode)

    def modes(self) -> tuple[Mode, ...]:
        """One deployment mode per network, the student's first."""
        return tuple(dataclasses.replace(m.modes[0], params=(name,)) for name, m in self.networks.items())

    def requires(self) -> tuple[str, ...]:
        """Batch fields that training needs, every one once."""
        fields = [field for network in self.networks.values() for field in network.requires]
        if TEACHER not in self.networks:
            fields += [objectives.TEACHER_HAZARDS, objectives.HAS_TEACHER]
        return tuple(dict.fromkeys(fields))

    def _network(self, mode: str) -> str:
        known = {m.name: m.params[0] for m in self.modes()}
        if mode not in known:
            raise ValueError(f"mode {mode!r} is not available in this run; it has {list(known)}")
        return known[mode]


def _network_key(key: jax.Array, name: str) -> jax.Array:
    """The student's key is that of a supervised run, so that it starts, and drops out, alike with any teacher."""
    return key if name == STUDENT else jax.random.fold_in(key, _TEACHER_STREAM)


def _own(params: Params, name: str) -> Params:
    """The parameters of one network as its supervised method knows them."""
    if name not in params:
        raise ValueError(f"parameters of {name!r} are needed but absent; present: {sorted(params)}")
    return {supervised.GROUP: params[name]}


def _network(config: ml_collections.ConfigDict, data: DataSpec, group: str) -> Method:
    try:
        return supervised.make_method(as_supervised(config, group), data)
    except ValueError as error:
        raise renamed(error, group) from None


def _stages(config: ml_collections.ConfigDict, modes: Mapping[str, str]) -> tuple[Stage, ...]:
    if config.distill.schedule == TWO_STAGE:
        return (
            Stage(TEACHER_STAGE, (TEACHER,), (modes[TEACHER],)),
            Stage(STUDENT_STAGE, (STUDENT,), (modes[STUDENT],)),
        )
    name = STUDENT_STAGE if config.distill.schedule == CACHED else ONLINE_STAGE
    return (Stage(name, tuple(modes), (modes[STUDENT],)),)


def make_method(config: ml_collections.ConfigDict, data: DataSpec) -> Method:
    """Builds survival distillation.

    Args:
      config: with the keys of `default_config`.
      data: widths, number of time bins, genes; the task must be survival.

    Returns:
      The method.

    Raises:
      ValueError: on an unknown or contradictory switch, or a width that does not match.
    """
    validate(config)
    if data.task != SURVIVAL:
        raise ValueError(f"survival_kd distils survival models, not task {data.task!r}: set task_kind = 'survival'")
    run = _SurvivalKd({name: _network(config, data, name) for name in groups(config)}, objective_spec(config))
    modes = {mode.params[0]: mode.name for mode in run.modes()}
    if config.get("infer", {}).get("mode", modes[STUDENT]) not in modes.values():
        raise ValueError(f"infer.mode = {config.infer.mode!r} is not possible; expected one of {list(modes.values())}")
    return Method(
        name="survival_kd",
        init=run.init,
        forward=run.forward,
        objective=run.objective,
        predict=run.predict,
        attention=run.attention,
        modes=run.modes(),
        stages=_stages(config, modes),
        requires=run.requires(),
        # Both networks come from recipes that accumulate an exact number of bags, and the order term couples them.
        batch_coupled=True,
        traced=objectives.traced_keys(config.distill.schedule == CACHED),
    )
