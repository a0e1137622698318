"""What fixes the architecture of an image encoder. Nothing here computes."""

from __future__ import annotations

import dataclasses
import math

CLS, MEAN, CLS_MEAN = "cls", "mean", "cls_mean"
POOLS = (CLS, MEAN, CLS_MEAN)
GELU, SWIGLU = "gelu", "swiglu"
NORMS = ("tokens", "pooled", "none")
HE, GLOROT = "he_normal", "glorot_uniform"


@dataclasses.dataclass(frozen=True)
class ViTSpec:
    """A vision transformer with the norm in front of each residual branch (Dosovitskiy et al. 2021; DINOv2 variants).

    Attributes:
      patch: edge of a patch in pixels.
      width: token width D.
      depth: blocks.
      heads: attention heads; contiguous parts of D.
      hidden: outputs of the first MLP layer; with SwiGLU both halves together (gate first), as timm's SwiGLUPacked.
      image: edge of the images for which there are position embeddings.
      mlp: "gelu" (exact, by erf) or "swiglu".
      registers: register tokens behind the class token.
      class_token: whether there is one.
      embed_prefix: position embeddings cover class and register tokens too (timm: not no_embed_class).
      layer_scale: a learned factor per channel on both residual branches.
      qkv_bias: bias of queries, keys and values.
      pool: "cls", "mean" of the patch tokens, or "cls_mean", both side by side [2 D] (Virchow2).
      norm: final norm of "tokens", of the "pooled" vector (timm's fc_norm), or "none".
      eps: of all norms.
    """

    patch: int
    width: int
    depth: int
    heads: int
    hidden: int
    image: int = 224
    mlp: str = GELU
    registers: int = 0
    class_token: bool = True
    embed_prefix: bool = True
    layer_scale: bool = False
    qkv_bias: bool = True
    pool: str = CLS
    norm: str = "tokens"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        """Refuses sizes and choices that fit no network."""
        sizes = (self.patch, self.width, self.depth, self.heads, self.hidden, self.image)
        if min(sizes) < 1 or self.registers < 0 or self.width % self.heads or self.image % self.patch:
            raise ValueError(f"{self}: expected positive sizes, heads that divide width and a patch that divides image")
        if self.mlp not in (GELU, SWIGLU) or self.pool not in POOLS or self.norm not in NORMS:
            raise ValueError(f"{self}: expected mlp in {(GELU, SWIGLU)}, pool in {POOLS}, norm in {NORMS}")
        if self.mlp == SWIGLU and self.hidden % 2:
            raise ValueError(f"{self}: SwiGLU halves its hidden width, which must be even")
        if self.pool != MEAN and not self.class_token:
            raise ValueError(f"{self}: pool={self.pool!r} needs the class token")

    @property
    def grid(self) -> int:
        """Patches along an edge of the image."""
        return self.image // self.patch

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches."""
        return int(self.class_token) + self.registers

    @property
    def positions(self) -> int:
        """Rows of the position embedding."""
        return self.grid**2 + (self.prefix if self.embed_prefix else 0)

    @property
    def features(self) -> int:
        """Width of an embedding."""
        return self.width * (2 if self.pool == CLS_MEAN else 1)

    def check_image(self, height: int, width: int) -> None:
        """Refuses images that cannot be cut into patches.

        Raises:
          ValueError: an edge is no multiple of the patch.
        """
        if height % self.patch or width % self.patch or not height or not width:
            raise ValueError(
                f"images of {height} x {width} px cannot be cut into patches of {self.patch} px: choose a multiple, "
                f"e.g. {max(1, round(height / self.patch)) * self.patch}"
            )


@dataclasses.dataclass(frozen=True)
class ResNetSpec:
    """A bottleneck ResNet (He et al. 2016) with global average pooling behind its last used stage.

    Attributes:
      blocks: blocks of each stage; fewer stages cut the network (CLAM's trunk: the first three of ResNet-50).
      width: channels of the stem; stage i has bottlenecks of `width * 2**i` and outputs of four times that.
      stride_in_3x3: the first block of a stage strides in its 3x3 convolution (torchvision, timm), or in its first 1x1
        (Keras' version 1; methods/more_from_less.md, A2).
      conv_bias: biases of the convolutions.
      bn_eps: of the batch norms.
      bn_momentum: running = momentum * running + (1 - momentum) * batch, with the population variance of the batch.
      kernel_init: "he_normal" (fan out) or "glorot_uniform".
      image: usual edge of an image; any other works.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    stride_in_3x3: bool = True
    conv_bias: bool = False
    bn_eps: float = 1e-5
    bn_momentum: float = 0.9
    kernel_init: str = HE
    image: int = 224

    def __post_init__(self) -> None:
        """Refuses sizes and choices that fit no network."""
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not self.blocks or min(*self.blocks, self.width, self.image) < 1:
            raise ValueError(f"{self}: expected at least one stage and positive sizes")
        if self.kernel_init not in (HE, GLOROT) or not 0 <= self.bn_momentum < 1:
            raise ValueError(f"{self}: expected kernel_init in {(HE, GLOROT)} and 0 <= bn_momentum < 1")

    @property
    def features(self) -> int:
        """Width of an embedding."""
        return 4 * self.width * 2 ** (len(self.blocks) - 1)

    def check_image(self, height: int, width: int) -> None:
        """Refuses images that the strides reduce to nothing.

        Raises:
          ValueError: an edge is zero.
        """
        if not height or not width:
            raise ValueError(f"images of {height} x {width} px are empty")


Spec = ViTSpec | ResNetSpec


def vit_parameters(spec: ViTSpec) -> int:
    """Number of parameters of a vision transformer, by the sizes of its layers."""
    d, inner = spec.width, spec.hidden // (2 if spec.mlp == SWIGLU else 1)
    block = 3 * d * d + 3 * d * spec.qkv_bias + d * d + d
    block += d * spec.hidden + spec.hidden + inner * d + d
    block += 4 * d + 2 * d * spec.layer_scale
    ends = (3 * spec.patch**2 + 1) * d + (spec.prefix + spec.positions) * d + 2 * d * (spec.norm != "none")
    return spec.depth * block + ends


def resnet_convolutions(spec: ResNetSpec, image: int) -> list[tuple[int, int, int, int]]:
    """(kernel edge, inputs, outputs, edge of the output map) of every convolution on square images."""
    edge = math.ceil(image / 2)
    found, inputs = [(7, 3, spec.width, edge)], spec.width
    edge = math.ceil(edge / 2)
    for stage, count in enumerate(spec.blocks):
        inner = spec.width * 2**stage
        for block in range(count):
            before, edge = edge, math.ceil(edge / 2) if stage and not block else edge
            found.append((1, inputs, inner, before if spec.stride_in_3x3 else edge))
            found += [(3, inner, inner, edge), (1, inner, 4 * inner, edge)]
            if not block:
                found.append((1, inputs, 4 * inner, edge))
            inputs = 4 * inner
    return found


def forward_flops(spec: Spec, image: int) -> int:
    """FLOPs (2 per multiply-add, products and convolutions only) of one square image in inference.

    Args:
      spec: the encoder.
      image: edge in pixels.
    """
    if isinstance(spec, ResNetSpec):
        return sum(2 * k * k * i * o * edge * edge for k, i, o, edge in resnet_convolutions(spec, image))
    d, patches = spec.width, (image // spec.patch) ** 2
    tokens = patches + spec.prefix
    inner = spec.hidden // (2 if spec.mlp == SWIGLU else 1)
    per_token = 4 * d * d + d * spec.hidden + inner * d + 2 * tokens * d
    return 2 * (spec.depth * tokens * per_token + patches * 3 * spec.patch**2 * d)
