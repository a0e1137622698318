"""Which tensor of a PyTorch checkpoint is which variable of an encoder.

Names are those of timm (torchvision's for ResNets). Checkpoints of Hugging Face transformers (ViT, DINOv2) are renamed
to timm's first.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from histokd_jax.nn.encoders.specs import ResNetSpec, Spec, ViTSpec

Tensors = Mapping[str, np.ndarray]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor.

    Attributes:
      key: in the checkpoint.
      path: of the variable, see `variables.Flat`.
      layer: position within a variable that stacks all blocks; None for a variable of its own.
      kind: layout of the tensor: "same"; "matrix" [out, in]; "conv" [out, in, h, w]; "patch", a convolution that is a
        matrix product here; "tokens", with a leading axis of length one.
    """

    key: str
    path: str
    layer: int | None = None
    kind: str = "same"

    def shape(self, own: Shape, patch: int = 0) -> Shape:
        """Shape of the tensor, of the shape of the variable without the axis of layers."""
        if self.kind == "patch":
            return (own[1], 3, patch, patch)
        if self.kind == "tokens":
            return (1, *own)
        return {"same": own, "matrix": own[::-1], "conv": (own[-1], *own[-2:-1], *own[:-2])}[self.kind]

    def convert(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor in the layout of the variable, float32."""
        value = np.asarray(tensor, np.float32)
        if self.kind == "patch":
            return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
        return _LAYOUTS[self.kind](value)


_LAYOUTS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "same": lambda value: value,
    "matrix": lambda value: value.T,
    "conv": lambda value: value.transpose(2, 3, 1, 0),
    "tokens": lambda value: value[0],
}


def entries(spec: Spec) -> list[Entry]:
    """All tensors that an encoder needs, each once."""
    return list(_resnet(spec) if isinstance(spec, ResNetSpec) else _vit(spec))


def _pair(key: str, path: str, kind: str, layer: int | None = None, *, bias: bool = True) -> Iterator[Entry]:
    yield Entry(f"{key}.weight", f"{path}/kernel", layer, kind)
    if bias:
        yield Entry(f"{key}.bias", f"{path}/bias", layer)


def _norm(key: str, path: str, layer: int | None = None) -> Iterator[Entry]:
    yield Entry(f"{key}.weight", f"{path}/scale", layer)
    yield Entry(f"{key}.bias", f"{path}/bias", layer)


def _vit(spec: ViTSpec) -> Iterator[Entry]:
    yield from _pair("patch_embed.proj", "params/patch_embed", "patch")
    if spec.class_token:
        yield Entry("cls_token", "params/cls_token", None, "tokens")
    if spec.registers:
        yield Entry("reg_token", "params/reg_token", None, "tokens")
    yield Entry("pos_embed", "params/pos_embed", None, "tokens")
    for i in range(spec.depth):
        block, own = f"blocks.{i}", "params/blocks"
        yield from _norm(f"{block}.norm1", f"{own}/norm1", i)
        yield from _pair(f"{block}.attn.qkv", f"{own}/qkv", "matrix", i, bias=spec.qkv_bias)
        yield from _pair(f"{block}.attn.proj", f"{own}/proj", "matrix", i)
        yield from _norm(f"{block}.norm2", f"{own}/norm2", i)
        yield from _pair(f"{block}.mlp.fc1", f"{own}/fc1", "matrix", i)
        yield from _pair(f"{block}.mlp.fc2", f"{own}/fc2", "matrix", i)
        if spec.layer_scale:
            yield Entry(f"{block}.ls1.gamma", f"{own}/scale1", i)
            yield Entry(f"{block}.ls2.gamma", f"{own}/scale2", i)
    if spec.norm != "none":
        yield from _norm("norm" if spec.norm == "tokens" else "fc_norm", "params/norm")


def _resnet(spec: ResNetSpec) -> Iterator[Entry]:
    yield from _convolution(spec, "conv1", "bn1", "stem")
    for stage, count in enumerate(spec.blocks):
        for block in range(count):
            key, own = f"layer{stage + 1}.{block}", f"stage{stage}_block{block}"
            for i in (1, 2, 3):
                yield from _convolution(spec, f"{key}.conv{i}", f"{key}.bn{i}", f"{own}/conv{i}")
            if not block:
                yield from _convolution(spec, f"{key}.downsample.0", f"{key}.downsample.1", f"{own}/shortcut")


def _convolution(spec: ResNetSpec, conv: str, norm: str, own: str) -> Iterator[Entry]:
    yield from _pair(conv, f"params/{own}/conv", "conv", bias=spec.conv_bias)
    yield from _norm(norm, f"params/{own}/norm")
    yield Entry(f"{norm}.running_mean", f"batch_stats/{own}/norm/mean")
    yield Entry(f"{norm}.running_var", f"batch_stats/{own}/norm/var")


# --- other names for the same tensors

_WRAPPERS = ("backbone.", "encoder.", "model.", "visual.", "vit.", "dinov2.")
_SINGLE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
}
_ENDS = (
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"layernorm", "norm"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"blocks.\1.attn.proj"),
    (r"encoder\.layer\.(\d+)\.(?:layernorm_before|norm1)", r"blocks.\1.norm1"),
    (r"encoder\.layer\.(\d+)\.(?:layernorm_after|norm2)", r"blocks.\1.norm2"),
    (r"encoder\.layer\.(\d+)\.(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)", r"blocks.\1.mlp.fc1"),
    (r"encoder\.layer\.(\d+)\.(?:output\.dense|mlp\.fc2|mlp\.weights_out)", r"blocks.\1.mlp.fc2"),
)
_SCALE = re.compile(r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1")
_PART = re.compile(r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)")


def plain_names(state: Tensors) -> dict[str, np.ndarray]:
    """A checkpoint under timm's names.

    A prefix that all keys share ("backbone." and the like) is removed; transformers' names of ViT and DINOv2 are
    translated, with queries, keys and values joined. Keys that are not understood keep their names.

    Args:
      state: {key: tensor}.
    """
    while prefix := next((p for p in _WRAPPERS if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    if not any(key.startswith("embeddings.") for key in state):
        return dict(state)
    return {_renamed(key): value for key, value in _joined(state).items()}


def _renamed(key: str) -> str:
    stem, _, end = key.rpartition(".")
    for pattern, name in _ENDS:
        if match := re.fullmatch(pattern, stem):
            return f"{match.expand(name)}.{end}"
    if match := _SCALE.fullmatch(key):
        return f"blocks.{match[1]}.ls{match[2]}.gamma"
    return _SINGLE.get(key, key)


def _joined(state: Tensors) -> dict[str, np.ndarray]:
    """Queries, keys and values of a layer as one tensor where all three are there."""
    result, parts = {}, {}
    for key, value in state.items():
        if match := _PART.fullmatch(key):
            parts.setdefault((match[1], match[3]), {})[match[2]] = (key, value)
        else:
            result[key] = value
    for (layer, end), found in parts.items():
        if set(found) == {"query", "key", "value"}:
            joined = np.concatenate([np.asarray(found[name][1]) for name in ("query", "key", "value")])
            result[f"blocks.{layer}.attn.qkv.{end}"] = joined
        else:
            result |= dict(found.values())
    return result
