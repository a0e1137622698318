"""Names of the authors' PyTorch checkpoints against this library's parameter paths, both ways (section 4.7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import flax.traverse_util
import numpy as np

Tensors = Mapping[str, np.ndarray]
_TOKENS = "recon_net.tokens"
_UNUSED = "recon_net.cross_attention1."


def _attention(torch: str, ours: str) -> dict[str, str]:
    return {
        f"{torch}.to_q.0.weight": f"{ours}/q/kernel",
        f"{torch}.to_k.0.weight": f"{ours}/k/kernel",
        f"{torch}.to_v.weight": f"{ours}/v/kernel",
        f"{torch}.to_out.weight": f"{ours}/out/kernel",
        f"{torch}.to_out.bias": f"{ours}/out/bias",
    }


def _layers(kind: str, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for torch, ours in names.items():
        yield f"{torch}.weight", f"{ours}/{kind}"
        yield f"{torch}.bias", f"{ours}/bias"


_AFFINE = {
    "recon_net.wsi_net.0": "CAB/proj",
    "recon_net.ffn0.net.0": "CAB/ffn_1/expand",
    "recon_net.ffn0.net.2": "CAB/ffn_1/contract",
    "recon_net.ffn1.net.0": "CAB/ffn_2/expand",
    "recon_net.ffn1.net.2": "CAB/ffn_2/contract",
    "wsi_net.0": "HSB/patch_proj",
    "gate.attention_a.0": "HSB/gate/tanh",
    "gate.attention_b.0": "HSB/gate/sigmoid",
    "gate.attention_c": "HSB/gate/score",
    "hyperconv1.linear1": "HSB/hyper_dense_1",
    "hyperconv1.linear2": "HSB/hyper_dense_2",
    "ffn.net.0": "HSB/ffn/expand",
    "ffn.net.2": "HSB/ffn/contract",
    "butter.0": "HSB/reduce_dense",
    "classifier": "HSB/hazard_head",
}
_NORMS = {
    "recon_net.ln_1": "CAB/norm_query_1",
    "recon_net.ln_2": "CAB/norm_context",
    "recon_net.ln_3": "CAB/norm_ffn_1",
    "recon_net.ln_4": "CAB/norm_query_2",
    "recon_net.ln_5": "CAB/norm_ffn_2",
    "recon_net.ln_6": "CAB/norm_out",
    "wsi_net.1": "HSB/patch_norm",
    "hyperconv1.ln1": "HSB/hyper_norm_1",
    "hyperconv1.ln2": "HSB/hyper_norm_2",
    "ln1": "HSB/norm_ffn",
    "butter.1": "HSB/reduce_norm",
}


def tensor_names(groups: Sequence[int], second_attention: str = "shared") -> dict[str, str]:
    """Tensors of the default architecture.

    Args:
      groups: features of each gene group; a group of size 0 has no head.
      second_attention: "own" also names the second cross-attention, which the authors' code never calls.

    Returns:
      {PyTorch key: path in our parameter tree}.
    """
    heads, norms = {}, {}
    for i in (i for i, size in enumerate(groups) if size):
        torch, ours = f"recon_net.sig_reconstruct_net.{i}", f"HEADS/head_{i}"
        heads |= {f"{torch}.0": f"{ours}/dense", f"{torch}.4": f"{ours}/out"}
        norms[f"{torch}.1"] = f"{ours}/norm"
    names = {_TOKENS: "CAB/tokens"}
    names |= _attention("recon_net.cross_attention0", "CAB/cross_attn") | _attention("attention", "HSB/self_attn")
    if second_attention == "own":
        names |= _attention("recon_net.cross_attention1", "CAB/cross_attn_2")
    return names | dict(_layers("kernel", _AFFINE | heads)) | dict(_layers("scale", _NORMS | norms))


def from_torch(state: Tensors, groups: Sequence[int], second_attention: str = "shared") -> dict:
    """Parameters from a PyTorch state dict.

    Args:
      state: {PyTorch key: array}.
      groups: see `tensor_names`.
      second_attention: with "shared", the second cross-attention is left out.

    Returns:
      {"CAB", "HEADS", "HSB"}, dtypes as given.

    Raises:
      ValueError: listing keys that are missing or not known.
    """
    names = tensor_names(groups, second_attention)
    missing = sorted(set(names) - set(state))
    unknown = sorted(k for k in set(state) - set(names) if not k.startswith(_UNUSED))
    if missing or unknown:
        raise ValueError(f"not a G-HANet checkpoint: missing keys {missing}, unknown keys {unknown}")
    flat = {}
    for torch, ours in names.items():
        value = np.asarray(state[torch])
        flat[ours] = value[0] if torch == _TOKENS else value.T
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def to_torch(params: Mapping, groups: Sequence[int], second_attention: str = "shared") -> dict[str, np.ndarray]:
    """The reverse of `from_torch` (also maps a gradient tree to the checkpoint layout).

    Raises:
      ValueError: if the tree has other leaves than the network.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    names = tensor_names(groups, second_attention)
    if set(flat) != set(names.values()):
        raise ValueError(f"not the parameters of G-HANet: {sorted(set(flat) ^ set(names.values()))} differ")
    state = {torch: np.asarray(flat[ours]) for torch, ours in names.items()}
    return {torch: value[None] if torch == _TOKENS else value.T for torch, value in state.items()}
