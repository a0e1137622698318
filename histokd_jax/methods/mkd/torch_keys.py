"""Names of the authors' PyTorch checkpoints against this library's parameter paths, both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import flax.traverse_util
import numpy as np

from histokd_jax.methods.mkd.networks import GENOMIC, MULTIMODAL, STUDENT

Tensors = Mapping[str, np.ndarray]


def _attention(torch: str, ours: str) -> dict[str, str]:
    return {
        f"{torch}.attention_V.0": f"{ours}/tanh",
        f"{torch}.attention_U.0": f"{ours}/sigmoid",
        f"{torch}.attention_weights": f"{ours}/score",
    }


def _bilinear(torch: str, ours: str) -> dict[str, str]:
    return {
        f"{torch}.linear_h1.0": f"{ours}/h1",
        f"{torch}.linear_h2.0": f"{ours}/h2",
        f"{torch}.linear_z1": f"{ours}/z1",
        f"{torch}.linear_z2": f"{ours}/z2",
        f"{torch}.linear_o1.0": f"{ours}/o1",
        f"{torch}.linear_o2.0": f"{ours}/o2",
        f"{torch}.encoder1.0": f"{ours}/encode",
        f"{torch}.encoder2.0": f"{ours}/merge",
    }


_STUDENT = {"_fc1.0": "bag/proj", **_attention("attention", "bag/attention"), "classifier.fc": "head"}
_MKD_GENOMIC = {
    "fc1.0": "genes/tokens/proj",
    **_attention("abmil.attention", "genes/attention"),
    "abmil.classifier.fc": "head",
}
_MKD_MULTIMODAL = {
    "wsi_net.0": "bag/proj",
    **_attention("attention_path", "bag/attention"),
    "snn.0": "genes/tokens/proj",
    **_attention("attention_snn", "genes/attention"),
    "classifier": "head",
}
_GMKDN_GENOMIC = {
    "fc1.0": "genes/mrna/proj",
    "fc2.0": "genes/cnv/proj",
    **_attention("attention", "genes/attention"),
    **_bilinear("mm", "genes/fusion"),
    "classifier": "head",
}
_GMKDN_MULTIMODAL = {
    "wsi_net.0": "bag/proj",
    **_attention("attention_path", "bag/attention"),
    "mrna.0": "genes/mrna/proj",
    "cnv.0": "genes/cnv/proj",
    **_attention("attention_snn", "genes/attention"),
    **_bilinear("mm_omic", "genes/fusion"),
    **_bilinear("mm_multi", "fusion"),
    "classifier": "head",
}
_CONCAT = {"mm.0": "fusion/encode", "mm.2": "fusion/merge"}

UNUSED = {
    (GENOMIC, "mkd"): ("classifier.",),
    (GENOMIC, "gmkdn"): ("attention_rmna.",),
    (MULTIMODAL, "gmkdn"): ("coattn_mrna.", "coattn_cnv.", "transformer.", "multi_fc.", "attention."),
}
"""(network, variant) -> beginnings of the keys that the authors' code allocates and never uses in a forward pass."""


def layer_names(network: str, variant: str = "mkd", fusion: str = "bilinear") -> dict[str, str]:
    """Layers of one network.

    Args:
      network: "S_P", "T_M" or "T_G".
      variant: "mkd" or "gmkdn".
      fusion: "bilinear" or "concat" (T_M of mkd).

    Returns:
      {PyTorch module name: path in our parameter tree}; each layer has a weight and a bias.
    """
    if network == STUDENT:
        return dict(_STUDENT)
    if variant == "gmkdn":
        return dict(_GMKDN_GENOMIC if network == GENOMIC else _GMKDN_MULTIMODAL)
    if network == GENOMIC:
        return dict(_MKD_GENOMIC)
    return {**_MKD_MULTIMODAL, **(_bilinear("mm", "fusion") if fusion == "bilinear" else _CONCAT)}


def _tensors(layers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for torch, ours in layers.items():
        yield f"{torch}.weight", f"{ours}/kernel"
        yield f"{torch}.bias", f"{ours}/bias"


def _transpose(value: np.ndarray) -> np.ndarray:
    # Linear kernels are (out, in) there and (in, out) here; bilinear maps (out, first, second) agree.
    return value.T if value.ndim == 2 else value


def from_torch(state: Tensors, network: str, variant: str = "mkd", fusion: str = "bilinear") -> dict:
    """Parameters of one network from a PyTorch state dict.

    Args:
      state: {PyTorch key: array}. Tensors that the authors' code allocates but never uses are ignored.
      network: see `layer_names`.
      variant: see `layer_names`.
      fusion: see `layer_names`.

    Returns:
      Nested dict for the parameter group `network`, dtypes as given.

    Raises:
      ValueError: listing keys that are missing or not known.
    """
    names = dict(_tensors(layer_names(network, variant, fusion)))
    unused = UNUSED.get((network, variant), ())
    missing = sorted(set(names) - set(state))
    unknown = sorted(k for k in set(state) - set(names) if not k.startswith(unused))
    if missing or unknown:
        raise ValueError(
            f"not a {variant} {network} ({fusion}) checkpoint: missing keys {missing}, unknown keys {unknown}"
        )
    flat = {ours: _transpose(np.asarray(state[torch])) for torch, ours in names.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def to_torch(params: Mapping, network: str, variant: str = "mkd", fusion: str = "bilinear") -> dict[str, np.ndarray]:
    """The reverse of `from_torch` (also maps a gradient tree to the checkpoint layout).

    Args:
      params: nested dict of one parameter group.
      network: see `layer_names`.
      variant: see `layer_names`.
      fusion: see `layer_names`.

    Returns:
      {PyTorch key: array}.

    Raises:
      ValueError: if the tree has other leaves than the network.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    names = dict(_tensors(layer_names(network, variant, fusion)))
    if set(flat) != set(names.values()):
        raise ValueError(f"not the parameters of {network}: {sorted(set(flat) ^ set(names.values()))} differ")
    return {torch: _transpose(np.asarray(flat[ours])) for torch, ours in names.items()}
