"""The PyTorch loop of the student as users run it: one file per slide, a DataLoader, one bag and one update at a time.

Files are `SLIDE.pt` with a [n, D] tensor, the layout that CLAM and its descendants train from. Kept free of JAX, so
that the DataLoader's worker processes stay small.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks import torch_peer

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def write_files(folder: pathlib.Path, sizes: np.ndarray, feat_dim: int, dtype: str) -> None:
    """Writes one file of noise per slide.

    Args:
      folder: made if absent.
      sizes: [n] patches per slide.
      feat_dim: D.
      dtype: key of `DTYPES`; CLAM writes float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pool = torch.randn(8192, feat_dim, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    for i, size in enumerate(sizes):
        torch.save(pool[(torch.arange(int(size)) + 37 * i) % len(pool)], folder / f"slide{i:06d}.pt")


class SlideFiles(Dataset):
    """Slide i: (patches [n, D], label []).

    Args:
      folder: what `write_files` wrote.
      labels: [n] class of every slide.
    """

    def __init__(self, folder: pathlib.Path, labels: np.ndarray):
        self._files = sorted(folder.glob("*.pt"))
        self._labels = labels
        if len(self._files) != len(labels):
            raise ValueError(f"{folder.name} holds {len(self._files)} slides for {len(labels)} labels")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.load(self._files[index], weights_only=True), int(self._labels[index])


def loader(data: SlideFiles, workers: int, device: torch.device) -> DataLoader:
    """One bag at a time in random order; workers live on between epochs, so that their start is not measured."""
    options = {"persistent_workers": True, "multiprocessing_context": "spawn"} if workers else {}
    return DataLoader(
        data, batch_size=1, shuffle=True, num_workers=workers, pin_memory=device.type == "cuda", **options
    )


def make_epoch(
    module: torch_peer.StudentPeer, batches: DataLoader, device: torch.device, bfloat16: bool = False
) -> Callable[[], tuple[int, float]]:
    """A function that trains one epoch, an update per bag, and reads every loss, as the usual loop does.

    Args:
      module: the network, on `device`.
      batches: from `loader`.
      device: where to train.
      bfloat16: autocast the network.

    Returns:
      () -> (patches, mean loss).
    """
    step = torch_peer.make_step(module, module, bfloat16=bfloat16)

    def epoch() -> tuple[int, float]:
        patches, total = 0, 0.0
        for features, label in batches:
            bag = features[0].to(device, torch.bfloat16 if bfloat16 else torch.float32, non_blocking=True)
            total += float(step([(bag, label.to(device))]))
            patches += len(bag)
        return patches, total / len(batches)

    return epoch
