"""Names and layouts of public PyTorch checkpoints of TransMIL, MCAT, PORPOISE MMF and SurvPath, both ways.

Beside what `torch_keys` does, several tensors of a checkpoint may be parts of one array here: first layers of gene
groups lie side by side along their genes, the other layers of gene groups are stacked. Packed projections hold queries,
keys, values in this order on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.traverse_util
import numpy as np

from histokd_jax.methods.supervised.torch_keys import gated_attention, transposed, unchanged
from histokd_jax.nn.mil.readout import BILINEAR
from histokd_jax.nn.mil.transmil import PPEG_SIDES

Tensors = Mapping[str, np.ndarray]


class Tensor(NamedTuple):
    """Where one tensor of a checkpoint goes; the first fields are those of `torch_keys.Tensor`.

    Attributes:
      path: "/"-separated path in our parameters.
      read: checkpoint layout -> ours.
      write: our layout -> checkpoint.
      part: None for the whole array, an index of its first axis, or a range of it.
    """

    path: str
    read: Callable[[np.ndarray], np.ndarray] = unchanged
    write: Callable[[np.ndarray], np.ndarray] = unchanged
    part: int | slice | None = None


Table = dict[str, Tensor]


def _linear(layers: Mapping[str, str], bias: bool = True) -> Table:
    table = {}
    for torch, ours in layers.items():
        table[f"{torch}.weight"] = Tensor(f"{ours}/kernel", transposed, transposed)
        if bias:
            table[f"{torch}.bias"] = Tensor(f"{ours}/bias")
    return table


def _norm(layers: Mapping[str, str]) -> Table:
    names = (("weight", "scale"), ("bias", "bias"))
    return {f"{torch}.{a}": Tensor(f"{ours}/{b}") for torch, ours in layers.items() for a, b in names}


def _attention(torch: str, qkv: str, out: str) -> Table:
    """An attention of the framework: packed projection and output projection."""
    packed = {
        f"{torch}.in_proj_weight": Tensor(f"{qkv}/kernel", transposed, transposed),
        f"{torch}.in_proj_bias": Tensor(f"{qkv}/bias"),
    }
    return packed | _linear({f"{torch}.out_proj": out})


def _groups(torch: str, ours: str, sizes: Sequence[int]) -> Table:
    """The two layers of every gene group."""
    table, start = {}, 0
    for i, size in enumerate(sizes):
        first = slice(start, start + size)
        table[f"{torch}.{i}.0.0.weight"] = Tensor(f"{ours}/kernel1", transposed, transposed, first)
        table[f"{torch}.{i}.0.0.bias"] = Tensor(f"{ours}/bias1", part=i)
        table[f"{torch}.{i}.1.0.weight"] = Tensor(f"{ours}/kernel2", transposed, transposed, i)
        table[f"{torch}.{i}.1.0.bias"] = Tensor(f"{ours}/bias2", part=i)
        start += size
    return table


def _bilinear(gates: Sequence[bool] = (True, True)) -> Table:
    inner = [f"{letter}{i}" for i in (1, 2) for letter in ("hzo" if gates[i - 1] else "ho")]
    layers = {f"mm.linear_{name}.0": f"fuse/{name}" for name in inner}
    return _linear(layers | {"mm.encoder1.0": "fuse/encode", "mm.encoder2.0": "fuse/merge"})


def transmil() -> Table:
    """TransMIL (class `TransMIL` of its authors)."""

    def grid(read: bool) -> Callable[[np.ndarray], np.ndarray]:  # (C, 1, k, k) <-> [k, k, C]
        return (lambda t: t[:, 0].transpose(1, 2, 0)) if read else (lambda t: t.transpose(2, 0, 1)[:, None])

    table = {"cls_token": Tensor("cls_token", lambda t: t[0, 0], lambda t: t[None, None])}
    table |= _linear({"_fc1.0": "proj", "_fc2": "head"})
    for torch, side in zip(("proj", "proj1", "proj2"), PPEG_SIDES):
        table[f"pos_layer.{torch}.weight"] = Tensor(f"ppeg/kernel{side}", grid(True), grid(False))
        table[f"pos_layer.{torch}.bias"] = Tensor(f"ppeg/bias{side}")
    for layer in ("layer1", "layer2"):
        ours = f"{layer}/attention"
        table |= _linear({f"{layer}.attn.to_qkv": f"{ours}/qkv"}, bias=False)
        table |= _linear({f"{layer}.attn.to_out.0": f"{ours}/out"})
        table[f"{layer}.attn.res_conv.weight"] = Tensor(  # (heads, 1, taps, 1) <-> [taps, heads]
            f"{ours}/conv", lambda t: t[:, 0, :, 0].T, lambda t: t.T[:, None, :, None]
        )
    return table | _norm({"layer1.norm": "layer1/norm", "layer2.norm": "layer2/norm", "norm": "norm"})


def mcat(fusion: str, sizes: Sequence[int]) -> Table:
    """MCAT (class `MCAT_Surv`, small) with gene groups of the given sizes."""
    table = _linear({"wsi_net.0": "coattention/proj", "classifier": "head"})
    table |= _groups("sig_networks", "groups", sizes)
    table |= _attention("coattn", "coattention/qkv", "coattention/out")
    for stream in ("path", "omic"):
        ours = f"{stream}_stream"
        for i in range(2):
            torch, layer = f"{stream}_transformer.layers.{i}", f"{ours}/encoder/layers_{i}"
            table |= _attention(f"{torch}.self_attn", f"{layer}/qkv", f"{layer}/out")
            table |= _linear({f"{torch}.linear1": f"{layer}/fc1", f"{torch}.linear2": f"{layer}/fc2"})
            table |= _norm({f"{torch}.norm1": f"{layer}/norm1", f"{torch}.norm2": f"{layer}/norm2"})
        table |= _linear(gated_attention(f"{stream}_attention_head", f"{ours}/attention"))
        table |= _linear({f"{stream}_rho.0": f"{ours}/rho"})
    return table | (_bilinear() if fusion == BILINEAR else _linear({"mm.0": "fuse/encode", "mm.2": "fuse/merge"}))


def porpoise_mmf(gates: Sequence[bool] = (True, True)) -> Table:
    """PORPOISE MMF (class `PorpoiseMMF`); layers of gates that are off stay unused in the checkpoint and are absent."""
    layers = {"attention_net.1": "bag/proj", "rho.0": "rho", "classifier_mm": "head"}
    layers |= gated_attention("attention_net.4", "bag/attention")
    layers |= {f"fc_omic.{i}.0": f"omics/blocks_{i}" for i in range(2)}
    return _linear(layers) | _bilinear(gates)


def unused_porpoise_mmf(gates: Sequence[bool] = (True, True)) -> tuple[str, ...]:
    """Prefixes of checkpoint keys that the authors' code allocates but does not use."""
    return tuple(f"mm.linear_z{i}." for i, gate in enumerate(gates, start=1) if not gate)


def survpath(sizes: Sequence[int]) -> Table:
    """SurvPath (class `SurvPath`) with pathways of the given sizes."""
    layers = {"wsi_projection_net.0": "proj", "feed_forward.net.0": "fc1", "feed_forward.net.3": "fc2"}
    return {
        **_groups("sig_networks", "pathways", sizes),
        **_linear(layers | {"to_logits.0": "encode", "to_logits.2": "head"}),
        **_linear({"cross_attender.attn.to_qkv": "qkv"}, bias=False),
        **_norm({"cross_attender.norm": "norm1", "feed_forward.norm": "norm2", "layer_norm": "norm3"}),
    }


def from_torch(state: Tensors, table: Table, unused: tuple[str, ...] = ()) -> dict:
    """Our parameters from a state dict.

    Args:
      state: {checkpoint key: array}.
      table: of the network, e.g. `transmil()`.
      unused: prefixes of keys to ignore.

    Returns:
      Nested dict of parameters, dtypes as given.

    Raises:
      ValueError: listing keys that are missing or not known.
    """
    missing = sorted(set(table) - set(state))
    unknown = sorted(k for k in set(state) - set(table) if not k.startswith(unused))
    if missing or unknown:
        raise ValueError(f"not a checkpoint of this network: missing keys {missing}, unknown keys {unknown}")
    parts: dict[str, list[tuple[np.ndarray, Tensor]]] = {}
    for key, tensor in table.items():
        parts.setdefault(tensor.path, []).append((tensor.read(np.asarray(state[key])), tensor))
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
        key: np.asarray(t.write(np.asarray(flat[t.path] if t.part is None else flat[t.path][t.part])))
        for key, t in table.items()
    }
