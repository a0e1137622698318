"""A plain PyTorch loop of the student S_P, bag by bag: the peer that `bench_step` compares with.

Gated-attention MIL as most authors train it: one bag at a time in eager (or compiled) mode, the loss of each of the b
bags divided by b and pulled back at once, one AdamW step after b bags. Module names are those of the authors'
checkpoints, so `histokd_jax.methods.mkd.torch_keys` maps the weights. PyTorch is optional; nothing else imports this.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

Bag = tuple[torch.Tensor, torch.Tensor]
"""(patches [n, D] float32 or bfloat16, label [1] int64)."""
CPU = torch.device("cpu")


class _GatedAttention(nn.Module):
    """Attention-weighted mean of the patches of one bag."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.attention_V = nn.Sequential(nn.Linear(width, hidden), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(width, hidden), nn.Sigmoid())
        self.attention_weights = nn.Linear(hidden, 1)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        scores = self.attention_weights(self.attention_V(h) * self.attention_U(h))  # [n, 1]
        return torch.softmax(scores, dim=0).T @ h


class _Classifier(nn.Module):
    """Dropout and a linear layer."""

    def __init__(self, width: int, num_classes: int, rate: float):
        super().__init__()
        self.rate = rate
        self.fc = nn.Linear(width, num_classes)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.fc(functional.dropout(pooled, self.rate, self.training))


class StudentPeer(nn.Module):
    """S_P on one bag (MKD specification, section 4.2).

    Args:
      feat_dim: D.
      width: H.
      hidden: attention width A.
      num_classes: C.
      rate: dropout in front of the classifier.
    """

    def __init__(
        self, feat_dim: int = 1024, width: int = 256, hidden: int = 128, num_classes: int = 2, rate: float = 0.25
    ):
        super().__init__()
        self._fc1 = nn.Sequential(nn.Linear(feat_dim, width), nn.ReLU())
        self.attention = _GatedAttention(width, hidden)
        self.classifier = _Classifier(width, num_classes, rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, D] patches of one bag to logits [1, C]."""
        return self.classifier(self.attention(self._fc1(x)))

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes weights in checkpoint layout, as `torch_keys.to_torch` gives them; keys must match exactly."""
        self.load_state_dict({name: torch.tensor(np.asarray(value)) for name, value in state.items()})


def device_for(backend: str) -> torch.device:
    """The PyTorch device of the same kind as JAX's backend, so that both sides have the same machine.

    Args:
      backend: `jax.default_backend()`.

    Raises:
      ValueError: if PyTorch has no such device here.
    """
    if backend == "cpu":
        return torch.device("cpu")
    if backend == "gpu" and torch.cuda.is_available():
        # XLA's default for products of float32 operands; "highest" would handicap the peer.
        torch.set_float32_matmul_precision("high")
        return torch.device("cuda")
    raise ValueError(f"JAX runs on {backend}, and this PyTorch build has no device of that kind")


def bags_of(batch: Mapping[str, np.ndarray], device: torch.device = CPU, bfloat16: bool = False) -> list[Bag]:
    """The slides of a packed host batch as tensors; on CPU in float32 they share its memory.

    Args:
      batch: packed step with "patches" [R, L, D] float32, "segment_ids" and "label".
      device: where the bags lie.
      bfloat16: store the patches in bfloat16.

    Returns:
      One entry per slide, in slot order.
    """
    patches = batch["patches"].reshape(-1, batch["patches"].shape[-1])
    ids = batch["segment_ids"].reshape(-1)
    # A slide is contiguous in the stream of the step, also where it spans rows.
    counts = np.bincount(ids, minlength=len(batch["label"]) + 1)[1:]
    stops = np.cumsum(counts)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    return [
        (
            torch.from_numpy(patches[stop - count : stop]).to(device, dtype),
            torch.tensor([int(label)], device=device),
        )
        for stop, count, label in zip(stops, counts, batch["label"])
        if count
    ]


def accumulate(network: nn.Module, bags: Sequence[Bag], bfloat16: bool = False) -> torch.Tensor:
    """Adds the gradient of the mean cross-entropy of a step to the parameters, one bag at a time.

    Args:
      network: patches [n, D] -> logits [1, C].
      bags: the b slides of the step.
      bfloat16: run the network under autocast to bfloat16, with float32 parameters, as users do.

    Returns:
      [] the mean loss, not waited for.
    """
    device = bags[0][0].device
    total = torch.zeros((), device=device)
    for patches, label in bags:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = network(patches)
        loss = functional.cross_entropy(logits.float(), label) / len(bags)
        loss.backward()
        total += loss.detach()
    return total


def make_step(
    module: StudentPeer, network: nn.Module, lr: float = 2e-4, weight_decay: float = 1e-5, bfloat16: bool = False
):
    """A function (bags) -> [] mean loss that takes one optimizer step and does not wait for it.

    Args:
      module: owns the parameters.
      network: `module`, or its compiled form.
      lr: learning rate of AdamW.
      weight_decay: decoupled weight decay.
      bfloat16: see `accumulate`.
    """
    # fused: the fastest form of AdamW.
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay, fused=True)

    def step(bags: Sequence[Bag]) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = accumulate(network, bags, bfloat16)
        optimizer.step()
        return loss

    return step


def wait(result: torch.Tensor) -> None:
    """Returns when everything queued on the device of `result` is done."""
    if result.device.type == "cuda":
        torch.cuda.synchronize(result.device)


def compiled(module: StudentPeer) -> nn.Module:
    """`torch.compile` of the network for bags of any size."""
    return torch.compile(module, dynamic=True)


@contextlib.contextmanager
def all_cores() -> Iterator[int]:
    """Lets PyTorch use every core that this process may run on; yields their number."""
    before, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    try:
        yield cores
    finally:
        torch.set_num_threads(before)
