"""Published patch encoders by name: architecture, input convention, resolution, licence.

No weights are contained or downloaded. The facts were collected from the model cards and the code beside them; the
terms that came with your copy of the weights decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from histokd_jax.nn.encoders.specs import CLS_MEAN, SWIGLU, ResNetSpec, Spec, ViTSpec

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BILINEAR, BICUBIC = "bilinear", "bicubic"

_UNTRAINED = "no published weights of pathology; whatever you load"
_MAHMOOD = "CC BY-NC-ND 4.0, gated: academic research only"
_OWKIN = "Owkin non-commercial licence"


@dataclasses.dataclass(frozen=True)
class Transform:
    """From the pixels of a tile to the input of an encoder.

    Attributes:
      size: edge of the encoder's input.
      resize: edge to which a tile of any other size than `size` is resized before a centre crop to `size`.
      method: "bilinear" or "bicubic", both with antialiasing (support scaled), as Pillow does it.
      mean, std: per channel, of pixels on a scale of 0 to 1.
      scale: divisor of pixels before `mean` and `std`; 255, or 1 for networks that take 0..255.
    """

    size: int = 224
    resize: int = 224
    method: str = BILINEAR
    mean: tuple[float, float, float] = IMAGENET[0]
    std: tuple[float, float, float] = IMAGENET[1]
    scale: float = 255.0

    def __post_init__(self) -> None:
        """Refuses a crop larger than the image, and lists of another length."""
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if not 1 <= self.size <= self.resize or self.method not in (BILINEAR, BICUBIC):
            raise ValueError(f"{self}: expected 1 <= size <= resize and method {BILINEAR!r} or {BICUBIC!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(*self.std, self.scale) <= 0:
            raise ValueError(f"{self}: expected three means, three positive deviations and a positive scale")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A patch encoder without its weights.

    Attributes:
      name: how it is called in manifests.
      spec: the architecture.
      transform: of its input.
      mpp: micrometres per pixel of the tiles it was trained on (several if it was trained on several), before
        `transform`; empty if unknown or untrained.
      licence: of the published weights.
      unused: beginnings of keys in published checkpoints that the embedding does not need.
    """

    name: str
    spec: Spec
    transform: Transform = Transform()
    mpp: tuple[float, ...] = ()
    licence: str = _UNTRAINED
    unused: tuple[str, ...] = ()

    @property
    def features(self) -> int:
        """Width of an embedding."""
        return self.spec.features


def vit(patch: int, width: int, depth: int, heads: int, **options: Any) -> ViTSpec:
    """A specification whose MLP is four times as wide as its tokens, unless `hidden` is given."""
    return ViTSpec(patch, width, depth, heads, options.pop("hidden", 4 * width), **options)


_HEAD = ("head.", "mask_token", "pooler.")
_RESNET_UNUSED = ("fc.",)

_GIANT = {"hidden": 8192, "mlp": SWIGLU, "layer_scale": True}
_LIST = (
    Encoder("vit_tiny", vit(16, 192, 12, 3), unused=_HEAD),
    Encoder("vit_small", vit(16, 384, 12, 6), unused=_HEAD),
    Encoder("vit_base", vit(16, 768, 12, 12), unused=_HEAD),
    Encoder("uni", vit(16, 1024, 24, 16, layer_scale=True), mpp=(0.5,), licence=_MAHMOOD, unused=_HEAD),
    Encoder(
        "uni2_h",
        vit(14, 1536, 24, 24, registers=8, embed_prefix=False, **_GIANT),
        mpp=(0.5,), licence=_MAHMOOD, unused=_HEAD,
    ),
    Encoder(
        "virchow2",
        vit(14, 1280, 32, 16, hidden=6832, mlp=SWIGLU, layer_scale=True, registers=4, pool=CLS_MEAN),
        Transform(method=BICUBIC),
        mpp=(0.25, 0.5, 1.0, 2.0), licence="CC BY-NC-ND 4.0, gated: academic research only", unused=_HEAD,
    ),
    Encoder(
        "gigapath", vit(16, 1536, 40, 24, **_GIANT), Transform(resize=256, method=BICUBIC),
        mpp=(0.5,), licence="Apache-2.0, gated: research only", unused=_HEAD,
    ),
    Encoder(
        "h_optimus_0",
        vit(14, 1536, 40, 24, registers=4, embed_prefix=False, **_GIANT),
        Transform(mean=(0.707223, 0.578729, 0.703617), std=(0.211883, 0.230117, 0.177517), method=BICUBIC),
        mpp=(0.5,), licence="Apache-2.0, gated", unused=_HEAD,
    ),
    Encoder("phikon", vit(16, 768, 12, 12, eps=1e-12), mpp=(0.5,), licence=_OWKIN, unused=_HEAD),
    Encoder(
        "resnet50", ResNetSpec(), Transform(resize=256),
        licence="ImageNet weights of torchvision or timm: see there", unused=_RESNET_UNUSED,
    ),
    Encoder(
        "resnet50_clam", ResNetSpec((3, 4, 6)),
        licence="ImageNet weights of torchvision or timm: see there", unused=(*_RESNET_UNUSED, "layer4."),
    ),
)  # fmt: skip

PRESETS: Mapping[str, Encoder] = {encoder.name: encoder for encoder in _LIST}
"""Name -> encoder. "resnet50_clam" is cut behind the third stage (1024-d), as CLAM, MCAT and their successors do."""


def get(name: str) -> Encoder:
    """The encoder of a name.

    Raises:
      ValueError: it is unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"encoder {name!r} is unknown; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def changed(encoder: Encoder, settings: Sequence[str]) -> Encoder:
    """An encoder with another architecture.

    Args:
      encoder: the one to start from.
      settings: "key=value" of its specification, e.g. "image=518".

    Raises:
      ValueError: unknown keys, values of another type, or sizes that fit no network.
    """
    fields = {field.name: getattr(encoder.spec, field.name) for field in dataclasses.fields(encoder.spec)}
    changes = {}
    for text in settings:
        key, _, value = text.partition("=")
        if key not in fields:
            raise ValueError(f"{text!r}: the architecture of {encoder.name} has {', '.join(fields)}")
        changes[key] = _parsed(text, value, fields[key])
    if not changes:
        return encoder
    spec = dataclasses.replace(encoder.spec, **changes)
    size = changes.get("image", encoder.transform.size)
    resize = encoder.transform.resize * size // encoder.transform.size
    transform = dataclasses.replace(encoder.transform, size=size, resize=resize)
    name = f"{encoder.name} ({', '.join(settings)})"
    return dataclasses.replace(encoder, name=name, spec=spec, transform=transform)


def _parsed(text: str, value: str, like: Any) -> Any:
    """A value of the type of the present one."""
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(like, tuple):
            return tuple(int(part) for part in value.split(","))
        return type(like)(value)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{text!r}: expected a {type(like).__name__} as {like!r}") from error
