"""Names of the authors' PyTorch checkpoints against this library's parameter paths, both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import flax.traverse_util
import numpy as np

Tensors = Mapping[str, np.ndarray]

_AFFINE = {
    "wsi_encoder.gat1.lin_l": "SLIDE/gat_1/source",
    "wsi_encoder.gat1.lin_r": "SLIDE/gat_1/target",
    "wsi_encoder.gat2.lin_l": "SLIDE/gat_2/source",
    "wsi_encoder.gat2.lin_r": "SLIDE/gat_2/target",
    "wsi_encoder.res_proj1": "SLIDE/residual",
    "wsi_patch_projector": "SLIDE/patch_proj",
    "wsi_pool_projector": "SLIDE/slide_proj",
    "wsi_classifier_proto.1": "SLIDE/head_dense",
    "wsi_classifier_proto.4": "SLIDE/head_out",
    "rna_tower.encoder.0": "GENES/encode_dense",
    "rna_tower.encoder.4": "GENES/encode_out",
    "rna_decoder.decoder.0": "GENES/decode_dense",
    "rna_decoder.decoder.4": "GENES/decode_out",
    "rna_projector": "GENES/gene_proj",
}
_NORMS = {
    "wsi_encoder.ln1": "SLIDE/norm_1",
    "wsi_encoder.ln2": "SLIDE/norm_2",
    "wsi_classifier_proto.0": "SLIDE/head_norm",
    "rna_tower.encoder.1": "GENES/encode_norm",
    "rna_decoder.decoder.1": "GENES/decode_norm",
}
_PLAIN = {
    "wsi_encoder.gat1.bias": "SLIDE/gat_1/bias",
    "wsi_encoder.gat2.bias": "SLIDE/gat_2/bias",
    "attn_log_tau": "SLIDE/log_tau",
}
_SCORES = {"wsi_encoder.gat1.att": "SLIDE/gat_1/att", "wsi_encoder.gat2.att": "SLIDE/gat_2/att"}
# Row 0 of our array is the memory of class 0.
_CODES = ("mem_neg._codebook.embed", "mem_pos._codebook.embed")
_OUR_CODES = "MEMORY/codes"
UNUSED = tuple(
    f"{memory}._codebook.{name}"
    for memory in ("mem_pos", "mem_neg")
    for name in ("initted", "cluster_size", "embed_avg")
)
"""Buffers of the codebooks, which the authors' code stores and never uses."""


def _layers(kind: str, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for torch, ours in names.items():
        yield f"{torch}.weight", f"{ours}/{kind}"
        yield f"{torch}.bias", f"{ours}/bias"


def tensor_names() -> dict[str, str]:
    """{PyTorch key: path in our parameter tree} of all tensors but the memories."""
    return {**dict(_layers("kernel", _AFFINE)), **dict(_layers("scale", _NORMS)), **_PLAIN, **_SCORES}


def from_torch(state: Tensors) -> dict:
    """Parameters from a PyTorch state dict.

    Args:
      state: {PyTorch key: array}.

    Returns:
      {"SLIDE", "MEMORY", "GENES"}, dtypes as given.

    Raises:
      ValueError: listing keys that are missing or not known.
    """
    names = tensor_names()
    missing = sorted({*names, *_CODES} - set(state))
    unknown = sorted(k for k in set(state) - {*names, *_CODES} if k not in UNUSED)
    if missing or unknown:
        raise ValueError(f"not a MoMKD checkpoint: missing keys {missing}, unknown keys {unknown}")
    flat = {ours: _to_ours(torch, np.asarray(state[torch])) for torch, ours in names.items()}
    flat[_OUR_CODES] = np.concatenate([np.asarray(state[key]) for key in _CODES])
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def to_torch(params: Mapping) -> dict[str, np.ndarray]:
    """The reverse of `from_torch` (also maps a gradient tree to the checkpoint layout).

    Raises:
      ValueError: if the tree has other leaves than the networks.
    """
    flat, names = flax.traverse_util.flatten_dict(params, sep="/"), tensor_names()
    if set(flat) != {*names.values(), _OUR_CODES}:
        raise ValueError(f"not the parameters of MoMKD: {sorted(set(flat) ^ {*names.values(), _OUR_CODES})} differ")
    codes = np.asarray(flat[_OUR_CODES])
    state = {torch: _to_torch(torch, np.asarray(flat[ours])) for torch, ours in names.items()}
    return {**state, **{key: codes[row : row + 1] for row, key in enumerate(_CODES)}}


def _to_ours(key: str, value: np.ndarray) -> np.ndarray:
    return value[0] if key in _SCORES else value.T


def _to_torch(key: str, value: np.ndarray) -> np.ndarray:
    return value[None] if key in _SCORES else value.T
