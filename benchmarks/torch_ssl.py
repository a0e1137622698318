"""A TriDeNT step in plain PyTorch, channels first: the peer that `bench_ssl` compares with.

Written from the specification as most authors would write it: standard layers, one pass per branch, the covariance as a
matrix of D x D. PyTorch is optional; nothing else imports this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class _Unit(nn.Sequential):
    """Convolution and batch norm."""

    def __init__(self, inputs: int, outputs: int, edge: int, stride: int, spec):
        super().__init__(
            nn.Conv2d(inputs, outputs, edge, stride, edge // 2, bias=spec.conv_bias),
            nn.BatchNorm2d(outputs, spec.bn_eps, 1.0 - spec.bn_momentum),
        )


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, inner: int, stride: int, project: bool, spec):
        super().__init__()
        first, second = (1, stride) if spec.stride_in_3x3 else (stride, 1)
        self.conv1 = _Unit(inputs, inner, 1, first, spec)
        self.conv2 = _Unit(inner, inner, 3, second, spec)
        self.conv3 = _Unit(inner, 4 * inner, 1, 1, spec)
        if project:
            self.shortcut = _Unit(inputs, 4 * inner, 1, stride, spec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv3(functional.relu(self.conv2(functional.relu(self.conv1(x)))))
        return functional.relu(y + (self.shortcut(x) if hasattr(self, "shortcut") else x))


class EncoderPeer(nn.Module):
    """A bottleneck ResNet without a head.

    Args:
      spec: a `ResNetSpec`.
    """

    def __init__(self, spec):
        super().__init__()
        self.stem, inputs = _Unit(3, spec.width, 7, 2, spec), spec.width
        for stage, count in enumerate(spec.blocks):
            for block in range(count):
                inner, stride = spec.width * 2**stage, 2 if stage and not block else 1
                self.add_module(f"stage{stage}_block{block}", _Bottleneck(inputs, inner, stride, not block, spec))
                inputs = 4 * inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] to [B, features]."""
        x = functional.max_pool2d(functional.relu(self.stem(x)), 3, 2, 1)
        for name, block in self.named_children():
            x = x if name == "stem" else block(x)
        return x.mean(dim=(2, 3))


class ProjectorPeer(nn.Module):
    """Dense layers with batch norm and ReLU behind all but the last.

    Args:
      inputs: width of the encoder.
      widths: outputs of every layer.
    """

    def __init__(self, inputs: int, widths: Sequence[int]):
        super().__init__()
        for i, width in enumerate(widths):
            self.add_module(f"dense_{i}", nn.Linear(inputs, width))
            if i < len(widths) - 1:
                self.add_module(f"norm_{i}", nn.BatchNorm1d(width, 1e-3, 0.01))
            inputs = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, inputs] to [B, widths[-1]]."""
        for name, layer in self.named_children():
            x = functional.relu(layer(x)) if name.startswith("norm") else layer(x)
        return x


class TridentPeer(nn.Module):
    """Two encoders with their projectors and the three branches between them.

    Args:
      spec: a `ResNetSpec`.
      widths: of the projectors.
    """

    def __init__(self, spec, widths: Sequence[int]):
        super().__init__()
        for i in range(2):
            self.add_module(f"encoder_{i}", EncoderPeer(spec))
            self.add_module(f"projector_{i}", ProjectorPeer(spec.features, widths))

    def forward(self, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Three views [B, 3, H, W] to their embeddings [B, D]; the first two share a network."""
        networks = zip((0, 0, 1), views)
        return [getattr(self, f"projector_{i}")(getattr(self, f"encoder_{i}")(x)) for i, x in networks]

    def load(self, params: Mapping[str, object]) -> None:
        """Takes the weights of the library's networks; running averages stay."""
        with torch.no_grad():
            for group, tree in params.items():
                for path, value in _leaves(tree):
                    self.get_parameter(f"{group}.{_name(path)}").copy_(torch.tensor(_turned(path, np.asarray(value))))


def _leaves(tree: Mapping[str, object], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _name(path: tuple[str, ...]) -> str:
    """Name of a parameter here: units are sequences of a convolution and a norm."""
    places = {"conv": "0", "norm": "1", "kernel": "weight", "scale": "weight"}
    return ".".join(places.get(part, part) for part in path)


def _turned(path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return value
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def vicreg(branches: Sequence[torch.Tensor], gram: bool) -> torch.Tensor:
    """[B] branch-sum VICReg (section C1) with the default weights.

    Args:
      branches: embeddings [B, D].
      gram: the covariance term by B x B products instead of D x D.
    """
    inv = sum(((a - b) ** 2).mean(dim=1) for a in branches for b in branches if a is not b)
    var, cov = 0.0, 0.0
    for z in branches:
        y = z - z.mean(dim=0)
        var = var + functional.relu(1.0 - torch.sqrt((y**2).mean(dim=0) + 1e-5)).mean()
        total = ((y @ y.T if gram else y.T @ y) ** 2).sum()
        cov = cov + (total - ((y**2).sum(dim=0) ** 2).sum()) / (len(z) ** 2 * z.shape[1])
    return 25.0 * inv + 25.0 * var + cov


def make_step(net: TridentPeer, lr: float = 1e-4) -> Callable[[Sequence[torch.Tensor], bool], float]:
    """A function (views, gram) -> loss that takes one step of Adam with every gradient clipped on its own."""
    parameters = list(net.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr, eps=1e-7, fused=True)

    def step(views: Sequence[torch.Tensor], gram: bool) -> float:
        optimizer.zero_grad(set_to_none=True)
        each = vicreg(net(views), gram)
        each.sum().backward()
        for parameter in parameters:
            torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        optimizer.step()
        return float(each.detach().mean())

    return step
