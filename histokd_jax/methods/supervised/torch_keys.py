"""Names and layouts of the public PyTorch checkpoints against this library's parameter paths, both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.traverse_util
import numpy as np

Tensors = Mapping[str, np.ndarray]


def unchanged(value: np.ndarray) -> np.ndarray:
    """The identity: biases, norm scales, free parameters."""
    return value


def transposed(value: np.ndarray) -> np.ndarray:
    """Linear kernels are (out, in) there and (in, out) here."""
    return value.T


class Tensor(NamedTuple):
    """Where one tensor of a checkpoint goes.

    Attributes:
      path: "/"-separated path in our parameters.
      read: checkpoint layout -> ours.
      write: our layout -> checkpoint.
    """

    path: str
    read: Callable[[np.ndarray], np.ndarray] = unchanged
    write: Callable[[np.ndarray], np.ndarray] = unchanged


def linear(layers: Mapping[str, str], use_bias: bool = True) -> dict[str, Tensor]:
    """Linear layers.

    Args:
      layers: {module in the checkpoint: path of an `Affine` here}.
      use_bias: whether they have biases.

    Returns:
      {"MODULE.weight", "MODULE.bias": Tensor}.
    """
    found = {}
    for module, path in layers.items():
        found[f"{module}.weight"] = Tensor(f"{path}/kernel", transposed, transposed)
        if use_bias:
            found[f"{module}.bias"] = Tensor(f"{path}/bias")
    return found


def gated_attention(module: str, path: str, score: str = "attention_c") -> dict[str, str]:
    """Layers of a gated attention network, for `linear`: a = tanh branch, b = sigmoid branch, c = score."""
    return {
        f"{module}.attention_a.0": f"{path}/tanh",
        f"{module}.attention_b.0": f"{path}/sigmoid",
        f"{module}.{score}": f"{path}/score",
    }


def from_torch(state: Tensors, tensors: Mapping[str, Tensor], name: str = "network") -> dict:
    """Parameters from a checkpoint.

    Args:
      state: {checkpoint key: array}.
      tensors: what the network expects, `Network.torch(options)`.
      name: of the network, for messages.

    Returns:
      Nested dict of parameters, dtypes as given.

    Raises:
      ValueError: listing keys that are missing or not known.
    """
    missing, unknown = sorted(set(tensors) - set(state)), sorted(set(state) - set(tensors))
    if missing or unknown:
        raise ValueError(
            f"not a checkpoint of {name} with these options: missing keys {missing}, unknown keys {unknown}"
        )
    flat = {tensor.path: tensor.read(np.asarray(state[key])) for key, tensor in tensors.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def to_torch(params: Mapping, tensors: Mapping[str, Tensor], name: str = "network") -> dict[str, np.ndarray]:
    """The reverse of `from_torch` (also maps a gradient tree to the checkpoint layout).

    Args:
      params: nested dict of parameters.
      tensors: see `from_torch`.
      name: see `from_torch`.

    Returns:
      {checkpoint key: array}.

    Raises:
      ValueError: if the tree has other leaves than the network.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    paths = {tensor.path for tensor in tensors.values()}
    if set(flat) != paths:
        raise ValueError(f"not the parameters of {name} with these options: {sorted(set(flat) ^ paths)} differ")
    return {key: np.asarray(tensor.write(np.asarray(flat[tensor.path]))) for key, tensor in tensors.items()}
