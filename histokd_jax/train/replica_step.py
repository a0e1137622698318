"""The programs of a group of replicas: the step of a single run, over a leading replica axis.

On CPU the replicas of a device run one after the other inside the program ("map"): batched products are slow there,
and a replica that has stopped costs nothing. On accelerators they run together ("vmap"), so that one launch carries the
work of all of them; there a stopped replica is computed and masked. On several devices each holds its own replicas and
their batches; no device waits for another, so the program has no collective.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from histokd_jax.tasks import get_task
from histokd_jax.train import sharding, step
from histokd_jax.train.programs import Programs
from histokd_jax.train.state import TrainState, start_stage
from histokd_jax.types import Stage

MAP, VMAP, AUTO = "map", "vmap", "auto"
LOOPS = (AUTO, MAP, VMAP)


def resolve_loop(name: str, platform: str) -> str:
    """ "map" or "vmap".

    Args:
      name: `train.replica_loop`.
      platform: of the devices, e.g. "cpu"; decides under "auto".

    Raises:
      ValueError: unknown name.
    """
    if name not in LOOPS:
        raise ValueError(f"train.replica_loop={name!r}: expected one of {', '.join(LOOPS)}")
    if name == AUTO:
        return MAP if platform == "cpu" else VMAP
    return name


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Which device holds which replicas, and which stream of batches each of them reads.

    Replica r lies on device r // per_device. Replicas that read the same batches (same fold and seed, other weights)
    share a stream, so that patches are read and stored once per device.

    Attributes:
      count: replicas.
      streams: [devices][U] stream numbers that a device holds; shorter lists repeat their first.
      place: [padded] int32, for every replica the index of its stream on its device.
    """

    count: int
    streams: tuple[tuple[int, ...], ...]
    place: np.ndarray

    @property
    def padded(self) -> int:
        """Replicas including those that only fill up the last device."""
        return len(self.place)

    @property
    def per_device(self) -> int:
        """Replicas of one device."""
        return self.padded // len(self.streams)


def make_layout(stream_of: Sequence[int], devices: int) -> Layout:
    """Divides replicas over devices in contiguous blocks.

    Args:
      stream_of: stream number of each replica.
      devices: number of devices.
    """
    per_device = -(-len(stream_of) // devices)
    padded = [*stream_of, *[stream_of[-1]] * (per_device * devices - len(stream_of))]
    blocks = [padded[d * per_device : (d + 1) * per_device] for d in range(devices)]
    held = [tuple(dict.fromkeys(block)) for block in blocks]
    width = max(map(len, held))
    streams = tuple(own + own[:1] * (width - len(own)) for own in held)
    place = [own.index(stream) for own, block in zip(streams, blocks) for stream in block]
    return Layout(len(stream_of), streams, np.array(place, np.int32))


def stack_batches(layout: Layout, mesh: Mesh, batches: Mapping[int, Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
    """The batches of one step, [devices * U, ...] per field, each device holding the streams of its replicas.

    Args:
      layout: see `Layout`.
      mesh: replica mesh.
      batches: stream -> device arrays as a `Feeder` gives them; streams that are over may be absent.
    """
    # Whatever stands in for a stream that is over: no running replica reads it.
    spare = next(iter(batches.values()))
    blocks = [_stack([batches.get(stream, spare) for stream in held]) for held in layout.streams]
    out = {}
    for name, first in blocks[0].items():
        parts = [jax.device_put(block[name], device) for block, device in zip(blocks, mesh.devices.flat)]
        shape = (len(parts) * first.shape[0], *first.shape[1:])
        out[name] = jax.make_array_from_single_device_arrays(shape, sharding.by_replica(mesh), parts)
    return out


@jax.jit
def _stack(batches: list[Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


class ReplicaPrograms:
    """Compiles the step, the prediction and the end of an epoch of a group ahead of time, each once.

    Args:
      programs: those of single runs; gives method and optimizer and counts traces.
      cfg: configuration of any replica of the group.
      layout: devices and streams of the replicas.
      mesh: replica mesh.
    """

    def __init__(self, programs: Programs, cfg: ConfigDict, layout: Layout, mesh: Mesh):
        self.programs, self.layout, self.mesh = programs, layout, mesh
        self.loop = resolve_loop(cfg.train.replica_loop, mesh.devices.flat[0].platform)
        self._batching = cfg.train.batching
        self._outputs = get_task(cfg).outputs
        self._compiled: dict[Any, Any] = {}
        self._sharding = sharding.by_replica(mesh)

    def start(
        self,
        stage: Stage,
        starts: Sequence[tuple[Any, Any, jax.Array]],
        batch: Mapping[str, jax.Array],
        values: Mapping[str, Any],
    ) -> TrainState:
        """Stacked state at step 0 of a stage.

        Args:
          stage: the stage.
          starts: (params, extra, key) of every replica.
          batch: one batch of one replica, for its shapes.
          values: config keys that vary within the group -> [R].
        """
        params, extra, _ = starts[0]
        method = step.with_values(self.programs.method, {key: jnp.ones(()) for key in values})
        names = step.metric_names(method, stage.name, params, extra, batch)
        tx = self.programs.optimizer(stage, params)
        padded = [*starts, *[starts[-1]] * (self.layout.padded - len(starts))]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)
        return self.put(jax.vmap(lambda p, e, key: start_stage(p, e, key, tx, names))(*stacked))

    def put(self, tree: Any) -> Any:
        """Arrays with a leading replica axis, each replica on its device."""
        return jax.device_put(tree, self._sharding)

    def trim(self, tree: Any) -> Any:
        """Without the replicas that only fill up the last device."""
        if self.layout.padded == self.layout.count:
            return tree
        return jax.tree.map(lambda leaf: leaf[: self.layout.count], tree)

    def pad(self, tree: Any) -> Any:
        """Inverse of `trim`; the filling replicas repeat the last one."""
        missing = self.layout.padded - self.layout.count
        if not missing:
            return tree
        return self.put(jax.tree.map(lambda leaf: jnp.concatenate([leaf, *[leaf[-1:]] * missing]), tree))

    def train(
        self,
        stage: Stage,
        state: TrainState,
        batches: Mapping[str, jax.Array],
        lr: np.ndarray,
        values: Mapping[str, np.ndarray],
        active: np.ndarray,
    ) -> tuple[TrainState, jax.Array]:
        """One training step of the active replicas; donates `state`.

        Args:
          stage: the stage.
          state: stacked state.
          batches: from `stack_batches`.
          lr: [R] learning rates.
          values: config key -> [R], see `Method.traced`.
          active: [R] bool; the state of the others does not change.

        Returns:
          (new state, [padded] losses, 0 for replicas that are not active).
        """
        control = self._control(
            active, {"lr": self._filled(lr), "values": {k: self._filled(v) for k, v in values.items()}}
        )
        key = ("train", stage.name, _shapes(batches))
        if key not in self._compiled:
            body = step.make_train_step(
                self.programs.method, self.programs.optimizer(stage, state.params), stage.name, self._batching
            )
            self._compiled[key] = self._compile(
                stage.name, self._train_block(body), (state, batches, control), donate=0
            )
        return self._compiled[key](state, batches, control)

    def predict(
        self,
        modes: tuple[str, ...],
        state: TrainState,
        batches: Mapping[str, jax.Array],
        active: np.ndarray,
        keys: jax.Array | None = None,
    ) -> dict[str, dict[str, jax.Array]]:
        """mode -> output -> [padded, S, ...] of the active replicas.

        Args:
          modes: inference modes.
          state: stacked state.
          batches: from `stack_batches`.
          active: [R] bool; rows of the others mean nothing.
          keys: [R] keys that turn on dropout in the teachers, or None.
        """
        control = self._control(active, {} if keys is None else {"key": self._filled(keys)})
        args = ((state.params, state.extra), batches, control)
        key = ("predict", modes, keys is None, _shapes(batches))
        if key not in self._compiled:
            self._compiled[key] = self._compile("prediction", self._predict_block(modes), args)
        return self._compiled[key](*args)

    def close_epoch(self, state: TrainState, improved: np.ndarray) -> TrainState:
        """Keeps the parameters of the replicas that improved ([R] bool), and empties the metric sums."""
        args = (state, self.put(self._filled(improved)))
        if "close" not in self._compiled:
            self._compiled["close"] = jax.jit(_close_epoch, donate_argnums=0, out_shardings=self._sharding)
        return self._compiled["close"](*args)

    def _filled(self, values: Any) -> Any:
        if isinstance(values, jax.Array):
            return jnp.concatenate([values, *[values[-1:]] * (self.layout.padded - len(values))])
        return np.concatenate([values, np.repeat(values[-1:], self.layout.padded - len(values), axis=0)])

    def _control(self, active: np.ndarray, more: Mapping[str, Any]) -> dict[str, Any]:
        """What a step must know about every replica: [padded] each, and the number of active ones per device."""
        flags = np.zeros(self.layout.padded, bool)
        flags[: self.layout.count] = active
        blocks = flags.reshape(-1, self.layout.per_device)
        # Active replicas first, so that a loop can end after them.
        order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
        return self.put(
            {
                "active": flags,
                "order": order.reshape(-1),
                "running": blocks.sum(axis=1).astype(np.int32),
                "place": self.layout.place,
                **more,
            }
        )

    def _train_block(self, body: Callable) -> Callable:
        def one(hot, own, batches):
            # Neither changes within a step: they are not carried through the loop.
            state = hot.replace(rng=own["rng"])
            state, loss = body(state, _pick(batches, own["place"]), own["lr"], own["values"])
            return state.replace(rng=None), loss

        def block(state: TrainState, batches, control):
            self.programs.traces += 1
            hot = state.replace(rng=None, best_params=None, best_extra=None)
            each = {"rng": state.rng, **{key: control[key] for key in ("place", "lr", "values")}}
            hot, losses = self._over(one, hot, each, batches, control)
            kept = {"rng": state.rng, "best_params": state.best_params, "best_extra": state.best_extra}
            return hot.replace(**kept), losses

        return block

    def _predict_block(self, modes: tuple[str, ...]) -> Callable:
        predict = step.make_predict_step(self.programs.method, modes)

        def one(model, own, batches):
            found = predict(*model, _pick(batches, own["place"]), own.get("key"))
            return None, {mode: step.chosen_outputs(value, self._outputs) for mode, value in found.items()}

        def block(model, batches, control):
            each = {key: control[key] for key in ("place", "key") if key in control}
            return self._over(one, None, each, batches, control, constant=model)[1]

        return block

    def _over(self, one: Callable, hot: Any, each: Any, batches: Any, control: Any, constant: Any = None):
        """Applies `one`: (state or model, own values, batches) -> (state, result) to a device's active replicas."""
        count = control["place"].shape[0]

        def call(hot, constant, own):
            return one(hot if constant is None else constant, own, batches)

        if self.loop == VMAP:
            new, results = jax.vmap(call)(hot, constant, each)
            active = control["active"]
            kept = jax.tree.map(lambda old, upd: jnp.where(_along(active, upd), upd, old), hot, new)
            return kept, jax.tree.map(lambda out: jnp.where(_along(active, out), out, 0), results)

        shapes = jax.eval_shape(lambda *stack: call(*_pick(stack, 0)), hot, constant, each)[1]
        empty = jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), shapes)

        def skip(hot, constant, own):
            return hot, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def body(i, carry):
            r = control["order"][i]
            # The loop ends after the active replicas, so the branch is always taken. It is here because it bounds
            # fusion: a fused update would read the old moments of the stack again, and so copy all of it every turn.
            changed = lax.cond(control["active"][r], call, skip, *_pick((carry[0], constant, each), r))
            return jax.tree.map(lambda old, new: lax.dynamic_update_index_in_dim(old, new, r, 0), carry, changed)

        return lax.fori_loop(0, control["running"][0], body, (hot, empty))

    def _compile(self, name: str, block: Callable, args: tuple, donate: int | None = None):
        if self.mesh.size > 1:
            spec = PartitionSpec(sharding.REPLICA)
            # Nothing is exchanged, so there is nothing to check about varying axes.
            block = jax.shard_map(block, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)
        jitted = jax.jit(block, donate_argnums=() if donate is None else donate, out_shardings=self._sharding)
        compiled = jitted.lower(*args).compile()
        memory = compiled.memory_analysis()
        logging.info(
            "%s of %d replicas (%s): %.0f MiB of arguments and %.0f MiB of temporaries",
            name,
            self.layout.count,
            self.loop,
            memory.argument_size_in_bytes / 2**20,
            memory.temp_size_in_bytes / 2**20,
        )
        return compiled


def _close_epoch(state: TrainState, improved: jax.Array) -> TrainState:
    last, best = (state.params, state.extra), (state.best_params, state.best_extra)
    best = jax.tree.map(lambda new, old: jnp.where(_along(improved, new), new, old), last, best)
    totals = jax.tree.map(jnp.zeros_like, state.totals)
    return state.replace(best_params=best[0], best_extra=best[1], totals=totals)


def _pick(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree)


def _along(flags: jax.Array, like: jax.Array) -> jax.Array:
    return flags.reshape(flags.shape + (1,) * (like.ndim - 1))


def _shapes(batches: Mapping[str, jax.Array]) -> tuple:
    return tuple((name, value.shape, value.dtype) for name, value in sorted(batches.items()))
