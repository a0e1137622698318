"""The compiled programs of a run: one training step per stage and one prediction step, shared by all folds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from histokd_jax.train import distributed, gradients, memory, optim, sharding, state, step
from histokd_jax.types import Method, Stage


class Programs:
    """Compiles ahead of time, once per shape, and reports the memory a step needs before it runs.

    Args:
      method: what to train.
      cfg: the resolved configuration.
      mesh: the mesh of the run.

    Attributes:
      traces: how often a training step was traced (a test holds it at one per stage).
    """

    def __init__(self, method: Method, cfg: ConfigDict, mesh: Mesh):
        self.method, self.mesh = method, mesh
        self.traces = 0
        self._cfg = cfg
        self._compiled: dict[Any, Any] = {}
        self._metrics: dict[Any, list[str]] = {}
        self._predict: dict[tuple[str, ...], Any] = {}
        self._last_rate: tuple[float, jax.Array] | None = None

    def optimizer(self, stage: Stage, groups: Mapping[str, Any]):
        """The optimizer of a stage."""
        return optim.from_config(self._cfg.train, stage, tuple(groups))

    def start(
        self,
        stage: Stage,
        params: Any,
        extra: Any,
        rng: jax.Array,
        batch: Mapping[str, jax.Array],
        frozen: Any = step.NOTHING_FROZEN,
    ):
        """State at step 0 of a stage, on every device of the mesh."""
        key = _key(stage, batch)
        if key not in self._metrics:
            with jax.set_mesh(self.mesh):
                names = step.metric_names(self.method, stage.name, params, extra, batch, frozen)
            self._metrics[key] = sorted([*names, step.NONFINITE_STEPS]) if self._guards() else names
        first = state.start_stage(params, extra, rng, self.optimizer(stage, params), self._metrics[key])
        return sharding.put_tree(first, self._shardings(first))

    def _guards(self) -> bool:
        """Whether steps that are not finite are counted instead of ending the run."""
        return gradients.nonfinite(self._cfg.train) != gradients.RAISE

    def _shardings(self, tree: Any) -> Any:
        return sharding.state_shardings(self.mesh, tree, self._cfg.mesh.fsdp)

    def whole(self, tree: Any) -> Any:
        """The same arrays, complete on every device."""
        return sharding.put_tree(tree, sharding.state_shardings(self.mesh, tree, fsdp=False))

    def train(
        self,
        stage: Stage,
        train_state: state.TrainState,
        batch: Mapping[str, jax.Array],
        lr: float,
        frozen: Any = step.NOTHING_FROZEN,
    ):
        """One training step; donates `train_state`, not `frozen`, whose arrays are complete on every device.

        Returns:
          (new state, loss).
        """
        rate = self._rate(lr)
        key = _key(stage, batch)
        if key not in self._compiled:
            self._compiled[key] = self._compile(stage, train_state, batch, rate, frozen)
        return self._compiled[key](train_state, batch, rate, None, frozen)

    def _rate(self, lr: float) -> jax.Array:
        # It rarely changes; a NumPy scalar, because a Python number would be sent implicitly.
        if self._last_rate is None or self._last_rate[0] != lr:
            self._last_rate = lr, sharding.put_tree(np.float32(lr), sharding.replicated(self.mesh))
        return self._last_rate[1]

    def _compile(self, stage: Stage, train_state, batch, rate, frozen):
        divided, everywhere = self._shardings(train_state), sharding.replicated(self.mesh)
        moves = {}
        if self._cfg.mesh.fsdp:
            # Parameters are gathered once per step, so that no pass over the patches meets a sharded kernel.
            moves = {
                "gather": lambda params: jax.lax.with_sharding_constraint(params, everywhere),
                "scatter": lambda grads: jax.lax.with_sharding_constraint(grads, divided.params),
            }
        body = step.make_train_step(
            self.method, self.optimizer(stage, train_state.params), stage.name, self._cfg.train.batching,
            nonfinite=gradients.nonfinite(self._cfg.train), **moves,
        )  # fmt: skip

        def counted(*args):
            self.traces += 1
            return body(*args)

        with jax.set_mesh(self.mesh):
            compiled = (
                jax.jit(counted, donate_argnums=0, out_shardings=(divided, everywhere))
                .lower(train_state, batch, rate, None, frozen)
                .compile()
            )
        device = self.mesh.local_devices[0]
        text = memory.report(
            f"stage {stage.name}", memory.StepMemory.of(compiled), memory.capacity(device), device.device_kind
        )
        distributed.tell(text)
        return compiled

    def predict(self, modes: tuple[str, ...], params: Any, extra: Any, batch: Mapping[str, jax.Array], key=None):
        """{mode: {"prob" [S, C], ...}} of one step; `key` turns on dropout in the teachers."""
        if modes not in self._predict:
            self._predict[modes] = jax.jit(
                step.make_predict_step(self.method, modes), out_shardings=sharding.replicated(self.mesh)
            )
        if key is not None:
            key = self.whole(key)
        with jax.set_mesh(self.mesh):
            return self._predict[modes](params, extra, batch, key)


def _key(stage: Stage, batch: Mapping[str, jax.Array]) -> tuple:
    """What one program of a stage serves: fields of these shapes."""
    return stage.name, tuple((name, value.shape, value.dtype) for name, value in sorted(batch.items()))
