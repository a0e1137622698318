"""Image encoders in NumPy float64, written from the papers on tensors named as timm names them; and random tensors."""

import dataclasses

import numpy as np
from scipy.special import erf

from histokd_jax.encoders.presets import Encoder, Transform, vit
from histokd_jax.nn.encoders.specs import ResNetSpec

SMALL = Transform(size=28, resize=32)
"""Tiny images: 2 x 2 patches of 14 or (at 32 px) of 16."""
TINY = {
    "plain": vit(14, 16, 2, 2, image=28),
    "uni": vit(14, 16, 2, 4, image=28, layer_scale=True),
    "uni2_h": vit(14, 24, 3, 3, image=28, hidden=64, mlp="swiglu", layer_scale=True, registers=8, embed_prefix=False),
    "virchow2": vit(14, 16, 2, 2, image=28, hidden=44, mlp="swiglu", layer_scale=True, registers=4, pool="cls_mean"),
    "no_qkv_bias": vit(7, 16, 1, 2, image=28, qkv_bias=False),
    "mean": vit(14, 16, 2, 2, image=28, pool="mean", norm="pooled", class_token=False),
}
RESNETS = {
    "torchvision": ResNetSpec((2, 1, 1), width=4),
    "keras": ResNetSpec((2, 2), width=4, stride_in_3x3=False, conv_bias=True, bn_eps=1.001e-5, bn_momentum=0.99),
}


_POSITIVE = ("norm.weight", "norm1.weight", "norm2.weight", "gamma")


def encoder(spec, name="tiny", **changes):
    """An encoder of a small specification."""
    return dataclasses.replace(Encoder(name, spec, SMALL, unused=("head.", "fc.")), **changes)


def random_state(spec, seed=0):
    """{timm key: tensor} of a specification, float32, of the size of trained weights."""
    from histokd_jax.encoders.torch_keys import entries
    from histokd_jax.encoders.variables import flatten
    from histokd_jax.nn.encoders.build import shapes

    own, rng, state = flatten(shapes(spec)), np.random.default_rng(seed), {}
    for entry in entries(spec):
        shape = entry.shape(tuple(own[entry.path].shape)[entry.layer is not None :], getattr(spec, "patch", 0))
        fan = max(1, int(np.prod(shape[1:])))
        value = rng.standard_normal(shape) / np.sqrt(fan if len(shape) > 1 else 10)
        if entry.key.endswith(_POSITIVE) or ".bn" in f".{entry.key}" or "downsample.1" in entry.key:
            value = 1 + 0.3 * rng.random(shape)
        state[entry.key] = value.astype(np.float32)
    return state


# --- vision transformer


def vit_reference(spec, state, images):
    """[B, h, w, 3] -> [B, features]."""
    s = {key: np.asarray(value, np.float64) for key, value in state.items()}
    tokens = np.stack([_tokens(spec, s, image) for image in np.asarray(images, np.float64)])
    if spec.norm == "tokens":
        tokens = _layer_norm(tokens, s["norm.weight"], s["norm.bias"], spec.eps)
    parts = [] if spec.pool == "mean" else [tokens[:, 0]]
    if spec.pool != "cls":
        parts.append(tokens[:, spec.class_token + spec.registers :].mean(1))
    out = np.concatenate(parts, -1)
    return _layer_norm(out, s["fc_norm.weight"], s["fc_norm.bias"], spec.eps) if spec.norm == "pooled" else out


def _tokens(spec, s, image):
    p = spec.patch
    kernel, bias = s["patch_embed.proj.weight"], s["patch_embed.proj.bias"]
    x = []
    for y in range(0, image.shape[0], p):
        for z in range(0, image.shape[1], p):
            x.append(np.einsum("dchw,hwc->d", kernel, image[y : y + p, z : z + p]) + bias)
    x = np.array(x)
    prefix = ([s["cls_token"][0]] if spec.class_token else []) + ([s["reg_token"][0]] if spec.registers else [])
    if spec.embed_prefix:
        x = np.concatenate([*prefix, x]) + s["pos_embed"][0]
    else:
        x = np.concatenate([*prefix, x + s["pos_embed"][0]])
    for i in range(spec.depth):
        x = _block(spec, s, f"blocks.{i}", x)
    return x


def _block(spec, s, name, x):
    def linear(key, v):
        return v @ s[f"{name}.{key}.weight"].T + s.get(f"{name}.{key}.bias", 0.0)

    def norm(key, v):
        return _layer_norm(v, s[f"{name}.{key}.weight"], s[f"{name}.{key}.bias"], spec.eps)

    q, k, v = np.split(linear("attn.qkv", norm("norm1", x)), 3, axis=-1)
    heads = []
    for part in np.split(np.arange(spec.width), spec.heads):
        scores = q[:, part] @ k[:, part].T / np.sqrt(len(part))
        weights = np.exp(scores - scores.max(1, keepdims=True))
        heads.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
    x = x + linear("attn.proj", np.concatenate(heads, -1)) * s.get(f"{name}.ls1.gamma", 1.0)
    h = linear("mlp.fc1", norm("norm2", x))
    if spec.mlp == "swiglu":
        gate, value = np.split(h, 2, axis=-1)
        h = gate / (1 + np.exp(-gate)) * value
    else:
        h = 0.5 * h * (1 + erf(h / np.sqrt(2)))
    return x + linear("mlp.fc2", h) * s.get(f"{name}.ls2.gamma", 1.0)


def _layer_norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


# --- ResNet


def resnet_reference(spec, state, images):
    """[B, h, w, 3] -> [B, features], with running averages."""
    s = {key: np.asarray(value, np.float64) for key, value in state.items()}

    def unit(x, conv, norm, stride):
        y = convolve(x, s[f"{conv}.weight"], stride) + s.get(f"{conv}.bias", 0.0)
        scale = s[f"{norm}.weight"] / np.sqrt(s[f"{norm}.running_var"] + spec.bn_eps)
        return (y - s[f"{norm}.running_mean"]) * scale + s[f"{norm}.bias"]

    x = np.maximum(unit(np.asarray(images, np.float64), "conv1", "bn1", 2), 0)
    x = _max_pool(x)
    for stage, count in enumerate(spec.blocks):
        for block in range(count):
            name, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
            first, second = (1, stride) if spec.stride_in_3x3 else (stride, 1)
            y = np.maximum(unit(x, f"{name}.conv1", f"{name}.bn1", first), 0)
            y = np.maximum(unit(y, f"{name}.conv2", f"{name}.bn2", second), 0)
            y = unit(y, f"{name}.conv3", f"{name}.bn3", 1)
            x = np.maximum(y + (x if block else unit(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)), 0)
    return x.mean((1, 2))


def convolve(x, kernel, stride):
    """[B, h, w, c] with [out, c, k, k], padded by k // 2."""
    k = kernel.shape[-1]
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ocij->bhwo", windows, kernel)


def _max_pool(x):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2].max((-2, -1))
