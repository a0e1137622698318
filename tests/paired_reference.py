"""CoCoFNet and its student once more, in NumPy and float64, channels first, from the specification and the checkpoint
names alone. Slow and plain: it shares no line with the library."""

import math

import numpy as np

EPS = 1e-5
_erf = np.vectorize(math.erf, otypes=[np.float64])


class Tensors:
    """A state dict; in training mode batch norms use the batch and record new running statistics."""

    def __init__(self, state, train=False, unbiased=True):
        self.state = {k: np.asarray(v, np.float64) for k, v in state.items()}
        self.train, self.unbiased, self.new = train, unbiased, {}

    def __getitem__(self, key):
        return self.state[key]

    def has(self, key):
        return key in self.state


def gelu(x):
    return 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)))


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def conv(x, kernel, bias=None, stride=1, pad=0):
    """Cross-correlation [B, I, H, W] * [O, I, k, k], written as one sum per tap."""
    out_channels, _, k, _ = kernel.shape
    x = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    rows, columns = (x.shape[2] - k) // stride + 1, (x.shape[3] - k) // stride + 1
    y = np.zeros((x.shape[0], out_channels, rows, columns))
    for i in range(k):
        for j in range(k):
            view = x[:, :, i : i + stride * rows : stride, j : j + stride * columns : stride]
            y += np.einsum("bihw,oi->bohw", view[:, :, :rows, :columns], kernel[:, :, i, j])
    return y if bias is None else y + bias[None, :, None, None]


def depthwise(x, kernel, bias):
    y = np.empty_like(x)
    for c in range(x.shape[1]):
        y[:, c : c + 1] = conv(x[:, c : c + 1], kernel[c : c + 1], pad=kernel.shape[-1] // 2)
    return y + bias[None, :, None, None]


def batch_norm(t, stem, x):
    shape = (1, -1) + (1,) * (x.ndim - 2)
    if t.train:
        axes = (0, *range(2, x.ndim))
        mean, var, n = x.mean(axes), x.var(axes), x.size // x.shape[1]
        kept = var * n / (n - 1) if t.unbiased else var
        for name, new in (("running_mean", mean), ("running_var", kept)):
            t.new[f"{stem}.{name}"] = 0.9 * t[f"{stem}.{name}"] + 0.1 * new
    else:
        mean, var = t[f"{stem}.running_mean"], t[f"{stem}.running_var"]
    unit = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + EPS)
    return unit * t[f"{stem}.weight"].reshape(shape) + t[f"{stem}.bias"].reshape(shape)


def separable(t, stem, x):
    x = depthwise(x, t[f"{stem}.depth_conv.weight"], t[f"{stem}.depth_conv.bias"])
    return conv(x, t[f"{stem}.point_conv.weight"], t[f"{stem}.point_conv.bias"])


def plane(t, q, k, v, first, norm, second, gate="score_times_softmax"):
    """q, k [B, E, c, N] and v [B, c, N] to (values [B, c, N], map [B, 1, N, N])."""
    scores = np.einsum("becn,becm->benm", q, k) / math.sqrt(k.shape[2])
    mixed = batch_norm(t, norm, conv(scores, t[first], pad=1))
    weight = softmax(mixed)
    gated = weight if gate == "softmax" else mixed * weight
    found = conv(gated, t[second], pad=1)
    return np.einsum("bnm,bcm->bcn", found[:, 0], v), found


def flat(x):
    return x.reshape(*x.shape[:2], -1)


def expand(x, maps):
    """[B, E c, H, W] to [B, E, c, N]."""
    return x.reshape(x.shape[0], maps, x.shape[1] // maps, -1)


def global_unit(t, stem, x, maps=4, gate="score_times_softmax"):
    q, k, v = (separable(t, f"{stem}.{name}", x) for name in "qkv")
    names = (f"{stem}.attn_conv_0.0.weight", f"{stem}.attn_conv_0.1", f"{stem}.attn_conv_1.weight")
    out, found = plane(t, expand(q, maps), expand(k, maps), flat(v), *names, gate)
    return out.reshape(x.shape), found


def multi_scale(t, stem, x):
    parts, start = [], 0
    while t.has(f"{stem}.proj.{len(parts)}.weight"):
        kernel, bias = (t[f"{stem}.proj.{len(parts)}.{name}"] for name in ("weight", "bias"))
        parts.append(depthwise(x[:, start : start + len(kernel)], kernel, bias))
        start += len(kernel)
    return np.concatenate(parts, axis=1)


def local_unit(t, stem, x):
    x = batch_norm(t, f"{stem}.fc1.2", gelu(conv(x, t[f"{stem}.fc1.0.weight"])))
    x = x + multi_scale(t, f"{stem}.dwconv", x)
    x = batch_norm(t, f"{stem}.norm", gelu(x))
    return batch_norm(t, f"{stem}.fc2.1", conv(x, t[f"{stem}.fc2.0.weight"]))


def refine(t, stem, x):
    x = depthwise(x, t[f"{stem}.0.weight"], t[f"{stem}.0.bias"])
    x = gelu(batch_norm(t, f"{stem}.1", x))
    x = gelu(batch_norm(t, f"{stem}.4", conv(x, t[f"{stem}.3.weight"], t[f"{stem}.3.bias"])))
    return batch_norm(t, f"{stem}.7", conv(x, t[f"{stem}.6.weight"], t[f"{stem}.6.bias"]))


def block(t, stem, x, maps=4, gate="score_times_softmax"):
    x = x + depthwise(x, t[f"{stem}.pos_embed.weight"], t[f"{stem}.pos_embed.bias"])
    u, half = batch_norm(t, f"{stem}.norm1", x), x.shape[1] // 2
    near = local_unit(t, f"{stem}.token_mixer.local_unit", u[:, :half])
    far, _ = global_unit(t, f"{stem}.token_mixer.global_unit", u[:, half:], maps, gate)
    y = np.concatenate([near, far], axis=1)
    x = x + y + refine(t, f"{stem}.token_mixer.proj", y)
    h = batch_norm(t, f"{stem}.norm2", x)
    return x + conv(gelu(conv(h, t[f"{stem}.mlp.fc1.0.weight"])), t[f"{stem}.mlp.fc2.0.weight"])


def feed(t, stem, x):
    x = batch_norm(t, f"{stem}.fc1.2", gelu(conv(x, t[f"{stem}.fc1.0.weight"])))
    return batch_norm(t, f"{stem}.fc2.1", conv(x, t[f"{stem}.fc2.0.weight"]))


def answer(t, stem, side, asker, own, maps, gate, asked_by):
    q = flat(separable(t, f"{stem}.q_{asked_by}", asker))[:, None].repeat(maps, axis=1)
    k = expand(separable(t, f"{stem}.k_{side}", own), maps)
    v = flat(separable(t, f"{stem}.v_{side}", own))
    names = (f"{stem}.attn_conv_{side}0.0.weight", f"{stem}.attn_conv_{side}0.1", f"{stem}.attn_conv_{side}1.weight")
    out, found = plane(t, q, k, v, *names, gate)
    return conv(out.reshape(own.shape), t[f"{stem}.proj_{side}.weight"], pad=1), found


def cross_block(t, stem, a, b, maps=4, gate="score_times_softmax"):
    na, nb = batch_norm(t, f"{stem}.norm1_a", a), batch_norm(t, f"{stem}.norm1_b", b)
    inner = f"{stem}.cross_attn"
    da, map_a = answer(t, inner, "a", nb, na, maps, gate, "b")
    db, map_b = answer(t, inner, "b", na, nb, maps, gate, "a")
    a, b = a + da, b + db
    a = a + feed(t, f"{stem}.mlp_a", batch_norm(t, f"{stem}.norm2_a", a))
    b = b + feed(t, f"{stem}.mlp_b", batch_norm(t, f"{stem}.norm2_b", b))
    return a, b, map_a, map_b


def self_block(t, stem, x, maps=4, gate="score_times_softmax", source="block_input"):
    normed = batch_norm(t, f"{stem}.norm1_a", x)
    update, found = answer(t, f"{stem}.kd_cross_attn", "a", normed, normed, maps, gate, "a")
    middle = x + update
    fed = middle if source == "attn_output" else x
    return middle + feed(t, f"{stem}.mlp_a", batch_norm(t, f"{stem}.norm2_a", fed)), found


def patch(t, stem, x):
    kernel = t[f"{stem}.proj.weight"]
    return batch_norm(t, f"{stem}.norm", conv(x, kernel, t[f"{stem}.proj.bias"], stride=kernel.shape[-1]))


def level(t, suffix, x, **options):
    x, i = patch(t, f"patch_embed_{suffix}", x), 0
    while t.has(f"block_{suffix}.{i}.norm1.weight"):
        x, i = block(t, f"block_{suffix}.{i}", x, **options), i + 1
    return x


def head(t, x):
    mean, var = x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True)
    unit = (x - mean) / np.sqrt(var + EPS)
    unit = unit * t["avg_final.0.weight"][None, :, None, None] + t["avg_final.0.bias"][None, :, None, None]
    f3 = unit.mean((2, 3))
    hidden = f3 @ t["fc_new1.0.weight"].T + t["fc_new1.0.bias"]
    feat = np.maximum(batch_norm(t, "fc_new1.1", hidden), 0.0)
    return {"f3": f3, "feat": feat, "logits": feat @ t["fc_new2.weight"].T + t["fc_new2.bias"]}


def teacher(t, a, b, **options):
    """Tiles [B, 3, H, W] to the outputs of the network, maps as [B, 1, N, N]."""
    found = {}
    for i in range(3):
        a, b = level(t, f"A{i}", a, **options), level(t, f"B{i}", b, **options)
        a, b, found[f"map_a{i}"], found[f"map_b{i}"] = cross_block(t, f"cross_attn_{i}", a, b, **options)
        found[f"stream_a{i}"] = a
    return found | head(t, level(t, "concat", a + b, **options))


def student(t, x, source="block_input", **options):
    found = {}
    for i in range(3):
        x = level(t, f"A{i}", x, **options)
        x, found[f"map_a{i}"] = self_block(t, f"kd_cross_attn_{i}", x, source=source, **options)
        found[f"stream_a{i}"] = x
    return found | head(t, level(t, "A3", x, **options))
