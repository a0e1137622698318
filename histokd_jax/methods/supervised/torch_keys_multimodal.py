"""Names and layouts of public PyTorch checkpoints of TransMIL, MCAT, PORPOISE MMF and SurvPath, both ways.

Linear kernels are (out, in) there and [in, out] here; packed projections hold queries, keys, values in this order on
both sides. Layers of gene groups are separate tensors there and one array here: first layers side by side along their
genes, the others stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.traverse_util
import numpy as np

Tensors = Mapping[str, np.ndarray]


class Layout(NamedTuple):
    """How one tensor is stored on both sides."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda t: t, lambda t: t)
LINEAR = Layout(lambda t: t.T, lambda t: t.T)
TOKEN = Layout(lambda t: t[0, 0], lambda t: t[None, None])
PLANE = Layout(
    lambda t: t[:, 0].transpose(1, 2, 0), lambda t: t.transpose(2, 0, 1)[:, None]
)  # (C, 1, k, k) <-> k, k, C
LINE = Layout(lambda t: t[:, 0, :, 0].T, lambda t: t.T[:, None, :, None])  # (heads, 1, taps, 1) <-> taps, heads


class Tensor(NamedTuple):
    """Where a tensor of the checkpoint is among our parameters.

    Attributes:
      path: leaf of our tree.
      layout: how it is stored.
      part: None for the whole leaf, an index of its first axis, or a range of it.
    """

    path: str
    layout: Layout = SAME
    part: int | slice | None = None


Table = dict[str, Tensor]


def _linear(torch: str, ours: str, bias: bool = True) -> Table:
    table = {f"{torch}.weight": Tensor(f"{ours}/kernel", LINEAR)}
    return table | ({f"{torch}.bias": Tensor(f"{ours}/bias")} if bias else {})


def _norm(torch: str, ours: str) -> Table:
    return {f"{torch}.weight": Tensor(f"{ours}/scale"), f"{torch}.bias": Tensor(f"{ours}/bias")}


def transmil() -> Table:
    """TransMIL (class `TransMIL` of its authors)."""
    table = {"cls_token": Tensor("cls_token", TOKEN), **_linear("_fc1.0", "proj"), **_linear("_fc2", "head")}
    for torch, side in (("proj", 7), ("proj1", 5), ("proj2", 3)):
        table[f"pos_layer.{torch}.weight"] = Tensor(f"ppeg/kernel{side}", PLANE)
        table[f"pos_layer.{torch}.bias"] = Tensor(f"ppeg/bias{side}")
    for layer in ("layer1", "layer2"):
        table |= _norm(f"{layer}.norm", f"{layer}/norm")
        table |= _linear(f"{layer}.attn.to_qkv", f"{layer}/attention/qkv", bias=False)
        table |= _linear(f"{layer}.attn.to_out.0", f"{layer}/attention/out")
        table[f"{layer}.attn.res_conv.weight"] = Tensor(f"{layer}/attention/conv", LINE)
    return table | _norm("norm", "norm")


def _groups(torch: str, ours: str, sizes: Sequence[int]) -> Table:
    """The two layers of every gene group."""
    table, start = {}, 0
    for i, size in enumerate(sizes):
        table[f"{torch}.{i}.0.0.weight"] = Tensor(f"{ours}/kernel1", LINEAR, slice(start, start + size))
        table[f"{torch}.{i}.0.0.bias"] = Tensor(f"{ours}/bias1", SAME, i)
        table[f"{torch}.{i}.1.0.weight"] = Tensor(f"{ours}/kernel2", LINEAR, i)
        table[f"{torch}.{i}.1.0.bias"] = Tensor(f"{ours}/bias2", SAME, i)
        start += size
    return table


def survpath(sizes: Sequence[int]) -> Table:
    """SurvPath (class `SurvPath`) with pathways of the given sizes."""
    return {
        **_linear("wsi_projection_net.0", "proj"),
        **_groups("sig_networks", "pathways", sizes),
        **_norm("cross_attender.norm", "norm1"),
        **_linear("cross_attender.attn.to_qkv", "qkv", bias=False),
        **_norm("feed_forward.norm", "norm2"),
        **_linear("feed_forward.net.0", "fc1"),
        **_linear("feed_forward.net.3", "fc2"),
        **_norm("layer_norm", "norm3"),
        **_linear("to_logits.0", "encode"),
        **_linear("to_logits.2", "head"),
    }


def from_torch(state: Tensors, table: Table) -> dict:
    """Our parameters from a state dict.

    Args:
      state: {checkpoint key: array}.
      table: of the network, e.g. `transmil()`.

    Returns:
      Nested dict of parameters, dtypes as given.

    Raises:
      ValueError: listing keys that are missing or not known.
    """
    missing, unknown = sorted(set(table) - set(state)), sorted(set(state) - set(table))
    if missing or unknown:
        raise ValueError(f"not a checkpoint of this network: missing keys {missing}, unknown keys {unknown}")
    parts: dict[str, list[tuple[np.ndarray, Tensor]]] = {}
    for key, tensor in table.items():
        parts.setdefault(tensor.path, []).append((tensor.layout.to_ours(np.asarray(state[key])), tensor))
    flat = {path: _join([value for value, _ in own], own[0][1].part) for path, own in parts.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _join(values: Sequence[np.ndarray], part: int | slice | None) -> np.ndarray:
    if part is None:
        return values[0]
    return np.stack(values) if isinstance(part, int) else np.concatenate(values)


def to_torch(params: Mapping, table: Table) -> dict[str, np.ndarray]:
    """The reverse of `from_torch` (also maps a gradient tree to the checkpoint layout).

    Args:
      params: nested dict of the parameters of one network.
      table: of the network.

    Returns:
      {checkpoint key: array}.

    Raises:
      ValueError: if the tree has other leaves than the network.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    paths = {tensor.path for tensor in table.values()}
    if set(flat) != paths:
        raise ValueError(f"not the parameters of this network: {sorted(set(flat) ^ paths)} differ")
    return {
        key: t.layout.to_torch(np.asarray(flat[t.path] if t.part is None else flat[t.path][t.part]))
        for key, t in table.items()
    }
