"""Names of the authors' PyTorch checkpoints against this library's trees, both ways (specification, section 13)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import flax.traverse_util
import numpy as np

from histokd_jax.methods.hmkd.objective import TEACHER
from histokd_jax.nn.paired.spec import LEVELS, PairedSpec

Tensors = Mapping[str, np.ndarray]
PARAMS, STATISTICS = "params", "batch_stats"
COUNTER = "num_batches_tracked"
_KERNEL_AXES = (2, 3, 1, 0)  # (out, in, h, w), or (C, 1, h, w) if depth-wise, to channels last
_KERNEL_BACK = (3, 2, 0, 1)


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a tensor belongs.

    Attributes:
      collection: "params" or "batch_stats".
      path: slash-separated, within the tree of the network.
    """

    collection: str
    path: str


Names = Iterator[tuple[str, Target]]


def _layer(torch: str, ours: str, bias: bool = True) -> Names:
    yield f"{torch}.weight", Target(PARAMS, f"{ours}/kernel")
    if bias:
        yield f"{torch}.bias", Target(PARAMS, f"{ours}/bias")


def _group_norm(torch: str, ours: str) -> Names:
    yield f"{torch}.weight", Target(PARAMS, f"{ours}/scale")
    yield f"{torch}.bias", Target(PARAMS, f"{ours}/bias")


def _norm(torch: str, ours: str) -> Names:
    yield from _group_norm(torch, ours)
    yield f"{torch}.running_mean", Target(STATISTICS, f"{ours}/mean")
    yield f"{torch}.running_var", Target(STATISTICS, f"{ours}/var")


def _separable(torch: str, ours: str) -> Names:
    yield from _layer(f"{torch}.depth_conv", f"{ours}/depth")
    yield from _layer(f"{torch}.point_conv", f"{ours}/point")


def _plane(torch: str, ours: str, side: str) -> Names:
    yield f"{torch}.attn_conv_{side}0.0.weight", Target(PARAMS, f"{ours}/mix")
    yield from _norm(f"{torch}.attn_conv_{side}0.1", f"{ours}/norm")
    yield f"{torch}.attn_conv_{side}1.weight", Target(PARAMS, f"{ours}/collapse")


def _patch(torch: str, ours: str) -> Names:
    yield from _norm(f"{torch}.norm", f"{ours}/norm")
    yield from _layer(f"{torch}.proj", ours)


def _block(spec: PairedSpec, torch: str, ours: str) -> Names:
    yield from _layer(f"{torch}.pos_embed", f"{ours}/position")
    yield from _norm(f"{torch}.norm1", f"{ours}/norm1")
    yield from _local(spec, f"{torch}.token_mixer.local_unit", f"{ours}/local")
    for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
        yield from _separable(f"{torch}.token_mixer.global_unit.{short}", f"{ours}/global/{name}")
    yield from _plane(f"{torch}.token_mixer.global_unit", f"{ours}/global/attention", "")
    for first, name in ((0, "depth"), (3, "reduce"), (6, "expand")):
        yield from _layer(f"{torch}.token_mixer.proj.{first}", f"{ours}/refine/{name}")
        yield from _norm(f"{torch}.token_mixer.proj.{first + 1}", f"{ours}/refine/{name}_norm")
    yield from _norm(f"{torch}.norm2", f"{ours}/norm2")
    yield from _layer(f"{torch}.mlp.fc1.0", f"{ours}/mlp/expand", bias=False)
    yield from _layer(f"{torch}.mlp.fc2.0", f"{ours}/mlp/reduce", bias=False)


def _local(spec: PairedSpec, torch: str, ours: str) -> Names:
    yield from _layer(f"{torch}.fc1.0", f"{ours}/reduce", bias=False)
    yield from _norm(f"{torch}.fc1.2", f"{ours}/reduce_norm")
    for i in range(len(spec.local_kernels)):
        yield from _layer(f"{torch}.dwconv.proj.{i}", f"{ours}/multi_scale/scales_{i}")
    yield from _norm(f"{torch}.norm", f"{ours}/norm")
    yield from _layer(f"{torch}.fc2.0", f"{ours}/expand", bias=False)
    yield from _norm(f"{torch}.fc2.1", f"{ours}/expand_norm")


def _side(torch: str, attention: str, ours: str, side: str) -> Names:
    yield from _norm(f"{torch}.norm1_{side}", f"{ours}/norm1")
    for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
        yield from _separable(f"{attention}.{short}_{side}", f"{ours}/{name}")
    yield from _plane(attention, f"{ours}/attention", side)
    yield from _layer(f"{attention}.proj_{side}", f"{ours}/proj", bias=False)
    yield from _norm(f"{torch}.norm2_{side}", f"{ours}/norm2")
    for fc, name in (("fc1", "expand"), ("fc2", "reduce")):
        yield from _layer(f"{torch}.mlp_{side}.{fc}.0", f"{ours}/mlp/{name}", bias=False)
        yield from _norm(f"{torch}.mlp_{side}.{fc}.{2 if fc == 'fc1' else 1}", f"{ours}/mlp/{name}_norm")


def _level(spec: PairedSpec, suffix: str, ours: str, depth: int) -> Names:
    yield from _patch(f"patch_embed_{suffix}", f"{ours}/patch")
    for i in range(depth):
        yield from _block(spec, f"block_{suffix}.{i}", f"{ours}/block_{i}")


def _network(spec: PairedSpec, network: str) -> Names:
    teacher = network == TEACHER
    depths = spec.teacher_depths if teacher else spec.student_depths
    sides = ("a", "b") if teacher else ("a",)
    prefix, inner = ("cross_attn", "cross_attn") if teacher else ("kd_cross_attn", "kd_cross_attn")
    for level in range(LEVELS):
        for side in sides:
            yield from _level(spec, f"{side.upper()}{level}", f"stream_{side}_{level}", depths[level])
            torch = f"{prefix}_{level}"
            yield from _side(torch, f"{torch}.{inner}", f"cross_update_{level}/{side}", side)
    last, ours = ("concat", "fused") if teacher else (f"A{LEVELS}", "joint")
    yield from _level(spec, last, ours, depths[LEVELS])
    yield from _group_norm("avg_final.0", "head/norm")
    yield from _layer("fc_new1.0", "head/hidden")
    yield from _norm("fc_new1.1", "head/hidden_norm")
    yield from _layer("fc_new2", "head/logits")


def names(spec: PairedSpec, network: str) -> dict[str, Target]:
    """Every tensor of a checkpoint.

    Args:
      spec: depths and kernels of the network.
      network: "teacher" or "student".

    Returns:
      {PyTorch key: target}, without the step counters of the batch norms.
    """
    return dict(_network(spec, network))


def counters(spec: PairedSpec, network: str) -> tuple[str, ...]:
    """Keys of the step counters, which have no target."""
    ending = "running_var"
    return tuple(key.removesuffix(ending) + COUNTER for key in names(spec, network) if key.endswith(ending))


def _ours(value: np.ndarray) -> np.ndarray:
    return value.transpose(_KERNEL_AXES) if value.ndim == 4 else value.T


def _theirs(value: np.ndarray) -> np.ndarray:
    return value.transpose(_KERNEL_BACK) if value.ndim == 4 else value.T


def from_torch(state: Tensors, spec: PairedSpec, network: str) -> tuple[dict, dict]:
    """Trees of one network from a PyTorch state dict; every key is used exactly once.

    Args:
      state: {PyTorch key: array}, with or without step counters.
      spec: the architecture.
      network: "teacher" or "student".

    Returns:
      (parameters, running statistics), nested dicts, dtypes as given.

    Raises:
      ValueError: listing keys that are missing or not known.
    """
    known, skipped = names(spec, network), set(counters(spec, network))
    missing = sorted(set(known) - set(state))
    unknown = sorted(set(state) - set(known) - skipped)
    if missing or unknown:
        raise ValueError(f"not a checkpoint of the {network}: missing keys {missing[:6]}, unknown keys {unknown[:6]}")
    trees: dict[str, dict] = {PARAMS: {}, STATISTICS: {}}
    for key, target in known.items():
        trees[target.collection][target.path] = _ours(np.asarray(state[key]))
    return tuple(flax.traverse_util.unflatten_dict(tree, sep="/") for tree in trees.values())


def to_torch(params: Mapping, statistics: Mapping, spec: PairedSpec, network: str) -> dict[str, np.ndarray]:
    """The reverse of `from_torch`.

    Args:
      params: nested dict of the network.
      statistics: its running statistics.
      spec: the architecture.
      network: "teacher" or "student".

    Returns:
      {PyTorch key: array}, without step counters (see `counters`).

    Raises:
      ValueError: if the trees have other leaves than the network.
    """
    flat = {
        collection: flax.traverse_util.flatten_dict(tree, sep="/")
        for collection, tree in ((PARAMS, params), (STATISTICS, statistics))
    }
    known = names(spec, network)
    wanted = {(target.collection, target.path) for target in known.values()}
    present = {(collection, path) for collection, tree in flat.items() for path in tree}
    if wanted != present:
        raise ValueError(f"not the trees of the {network}: {sorted(wanted ^ present)[:6]} differ")
    return {key: _theirs(np.asarray(flat[t.collection][t.path])) for key, t in known.items()}
