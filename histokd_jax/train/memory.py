"""What a compiled step needs on each device, beside what the device has."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on one device, from the compiled program.

    Attributes:
      arguments: state and batch.
      temporaries: live only during the step.
      outputs: results that do not take the place of donated arguments.
    """

    arguments: int
    temporaries: int
    outputs: int

    @classmethod
    def of(cls, compiled: Any) -> StepMemory:
        """Of a compiled program."""
        found = compiled.memory_analysis()
        outputs = max(found.output_size_in_bytes - found.alias_size_in_bytes, 0)
        return cls(found.argument_size_in_bytes, found.temp_size_in_bytes, outputs)

    @property
    def total(self) -> int:
        """Bytes during a step."""
        return self.arguments + self.temporaries + self.outputs


def capacity(device: jax.Device) -> int:
    """Bytes that programs may use on a device; for CPU devices, which share it, the memory of the host."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return int(limit) if limit else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def report(title: str, need: StepMemory, limit: int, kind: str) -> str:
    """One line for the user.

    Args:
      title: what was compiled.
      need: of one step.
      limit: of the device, see `capacity`.
      kind: of the device.

    Raises:
      ValueError: if the step cannot fit.
    """
    mib = 2**20
    text = (
        f"{title}: one step needs {need.total / mib:,.0f} MiB of {limit / mib:,.0f} MiB per device ({kind}): "
        f"{need.arguments / mib:,.0f} state and batch, {need.temporaries / mib:,.0f} temporaries, "
        f"{need.outputs / mib:,.0f} results"
    )
    if need.total > limit:
        raise ValueError(
            f"{text}; lower train.b or data.max_patches_train, choose train.batching=grad_cache, or divide the step "
            "over more devices (mesh.data, mesh.fsdp)"
        )
    return text
