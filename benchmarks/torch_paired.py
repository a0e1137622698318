"""The student of HM-KD in plain PyTorch, channels first: the peer that `bench_paired` compares with.

Written from the specification of the network as most authors would write it: standard layers, the whole attention plane
in memory. Module names are those of the authors' checkpoints. PyTorch is optional; nothing else imports this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

MAPS = 4


def _depthwise(width: int, side: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, side, padding=side // 2, groups=width)


def _pointwise(inputs: int, outputs: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=bias)


class _Separable(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.depth_conv = _depthwise(inputs, 3)
        self.point_conv = _pointwise(inputs, outputs, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.point_conv(self.depth_conv(x))


def _attend(q, k, v, mix: nn.Module, collapse: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [B, E, c, N] and v [B, c, N] to (values [B, c, N], map [B, 1, N, N])."""
    mixed = mix(torch.matmul(q.transpose(-1, -2), k) * k.shape[2] ** -0.5)
    found = collapse(mixed * mixed.softmax(dim=-1))
    return torch.matmul(found[:, 0], v.transpose(-1, -2)).transpose(-1, -2), found


def _expand(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[0], MAPS, x.shape[1] // MAPS, -1)


def _mix() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(MAPS, MAPS, 3, padding=1, bias=False), nn.BatchNorm2d(MAPS))


def _collapse() -> nn.Conv2d:
    return nn.Conv2d(MAPS, 1, 3, padding=1, bias=False)


class _Global(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.q, self.k = _Separable(width, MAPS * width), _Separable(width, MAPS * width)
        self.v = _Separable(width, width)
        self.attn_conv_0, self.attn_conv_1 = _mix(), _collapse()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = _expand(self.q(x)), _expand(self.k(x)), self.v(x).flatten(2)
        return _attend(q, k, v, self.attn_conv_0, self.attn_conv_1)[0].reshape(x.shape)


class _MultiScale(nn.Module):
    def __init__(self, width: int, sides: Sequence[int]):
        super().__init__()
        share = width // len(sides)
        self.sizes = [width - share * (len(sides) - 1), *[share] * (len(sides) - 1)]
        self.proj = nn.ModuleList(_depthwise(size, side) for size, side in zip(self.sizes, sides))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([conv(part) for conv, part in zip(self.proj, x.split(self.sizes, dim=1))], dim=1)


class _Local(nn.Module):
    def __init__(self, width: int, sides: Sequence[int], reduction: int):
        super().__init__()
        hidden = width // reduction
        self.fc1 = nn.Sequential(_pointwise(width, hidden), nn.GELU(), nn.BatchNorm2d(hidden))
        self.dwconv = _MultiScale(hidden, sides)
        self.norm = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Sequential(_pointwise(hidden, width), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc1(x)
        x = self.norm(functional.gelu(x + self.dwconv(x)))
        return self.fc2(x)


class _Mixer(nn.Module):
    def __init__(self, width: int, inner: int, sides: Sequence[int], reduction: int):
        super().__init__()
        self.local_unit = _Local(width // 2, sides, reduction)
        self.global_unit = _Global(width // 2)
        self.proj = nn.Sequential(
            _depthwise(width, 3), nn.BatchNorm2d(width), nn.GELU(),
            _pointwise(width, inner, True), nn.BatchNorm2d(inner), nn.GELU(),
            _pointwise(inner, width, True), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        near, far = x.chunk(2, dim=1)
        y = torch.cat([self.local_unit(near), self.global_unit(far)], dim=1)
        return y + self.proj(y)


class _Mlp(nn.Module):
    def __init__(self, width: int, ratio: int, norms: bool):
        super().__init__()
        hidden = ratio * width
        inner, outer = ([nn.BatchNorm2d(hidden)], [nn.BatchNorm2d(width)]) if norms else ([], [])
        self.fc1 = nn.Sequential(_pointwise(width, hidden), nn.GELU(), *inner)
        self.fc2 = nn.Sequential(_pointwise(hidden, width), *outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x))


class _Block(nn.Module):
    def __init__(self, width: int, spec):
        super().__init__()
        self.pos_embed = _depthwise(width, 7)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.token_mixer = _Mixer(width, spec.refine_width(width), spec.local_kernels, spec.local_reduction)
        self.mlp = _Mlp(width, spec.mlp_ratio, norms=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.pos_embed(x)
        x = x + self.token_mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.q_a, self.k_a = _Separable(width, width), _Separable(width, MAPS * width)
        self.v_a = _Separable(width, width)
        self.attn_conv_a0, self.attn_conv_a1 = _mix(), _collapse()
        self.proj_a = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.q_a(x).flatten(2)[:, None], _expand(self.k_a(x)), self.v_a(x).flatten(2)
        out, found = _attend(q, k, v, self.attn_conv_a0, self.attn_conv_a1)
        return self.proj_a(out.reshape(x.shape)), found


class _Cross(nn.Module):
    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.norm1_a, self.norm2_a = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.kd_cross_attn = _Attention(width)
        self.mlp_a = _Mlp(width, ratio, norms=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        update, found = self.kd_cross_attn(self.norm1_a(x))
        return x + update + self.mlp_a(self.norm2_a(x)), found


class _Patch(nn.Module):
    def __init__(self, inputs: int, width: int, side: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(inputs, width, side, stride=side)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x))


class StudentPeer(nn.Module):
    """The student as released.

    Args:
      spec: a `PairedSpec`.
    """

    def __init__(self, spec):
        super().__init__()
        inputs = (3, *spec.widths)
        for i, width in enumerate(spec.widths):
            setattr(self, f"patch_embed_A{i}", _Patch(inputs[i], width, spec.stem_patch if i == 0 else 2))
            setattr(self, f"block_A{i}", nn.Sequential(*(_Block(width, spec) for _ in range(spec.student_depths[i]))))
            if i < 3:
                setattr(self, f"kd_cross_attn_{i}", _Cross(width, spec.mlp_ratio))
        last = spec.widths[-1]
        self.avg_final = nn.Sequential(nn.GroupNorm(1, last), nn.AdaptiveAvgPool2d(1))
        self.fc_new1 = nn.Sequential(nn.Linear(last, spec.head_hidden), nn.BatchNorm1d(spec.head_hidden), nn.ReLU())
        self.fc_new2 = nn.Linear(spec.head_hidden, spec.num_classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """[B, 3, H, W] to (logits [B, C], maps [B, 1, N, N] of three levels, f3)."""
        maps = []
        for i in range(4):
            x = getattr(self, f"block_A{i}")(getattr(self, f"patch_embed_A{i}")(x))
            if i < 3:
                x, found = getattr(self, f"kd_cross_attn_{i}")(x)
                maps.append(found)
        f3 = self.avg_final(x).flatten(1)
        return self.fc_new2(self.fc_new1(f3)), maps, f3

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes weights and running statistics in checkpoint layout; step counters stay."""
        given = {name: torch.tensor(np.asarray(value)) for name, value in state.items()}
        missing, unexpected = self.load_state_dict(given, strict=False)
        wrong = [name for name in missing if not name.endswith("num_batches_tracked")] + list(unexpected)
        if wrong:
            raise ValueError(f"not a state dict of the student: {wrong[:6]} differ")


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, label: torch.Tensor) -> float:
    """One step on the cross entropy; the maps enter with a weight of 1e-3, so that they are computed."""
    logits, maps, _ = net(x)
    loss = functional.cross_entropy(logits, label) + 1e-3 * sum((m**2).mean() for m in maps)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())
