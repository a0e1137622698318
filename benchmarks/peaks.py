"""Datasheet peaks of accelerators, by the `device_kind` that JAX reports. An unknown device is an error.

Dense rates (without structured sparsity), decimal units. Datasheet values are ceilings: on an H200 about 790 TFLOP/s
bfloat16 and 4.3 TB/s were measured where the datasheet says 989 and 4.8.
"""

from __future__ import annotations

import dataclasses

CPU_REASON = "not reported on CPU: the table holds no processor peaks, and cores share their clock and memory"


class UnknownDeviceError(ValueError):
    """A device that is not in the table."""


@dataclasses.dataclass(frozen=True)
class Peak:
    """Ceilings of one accelerator.

    Attributes:
      name: short name.
      bf16_tflops: matrix products of bfloat16 operands, 10^12 FLOP/s.
      tf32_tflops: matrix products of float32 operands rounded to TF32; None where the device has no such mode.
      fp32_tflops: float32 arithmetic without matrix units; None where it is not published.
      hbm_gb_s: device memory, 10^9 bytes/s.
      hbm_gb: size of device memory, 10^9 bytes.
      link_gb_s: links between accelerators of one domain, per accelerator and direction.
      link_domain: accelerators that share those links.
      pcie_gb_s: link to the host per direction; None where it is not published.
    """

    name: str
    bf16_tflops: float
    tf32_tflops: float | None
    fp32_tflops: float | None
    hbm_gb_s: float
    hbm_gb: float
    link_gb_s: float
    link_domain: int
    pcie_gb_s: float | None

    def product_tflops(self, dtype: str) -> float:
        """Peak of matrix products at XLA's default precision.

        Args:
          dtype: "bfloat16" or "float32"; float32 operands may be rounded to TF32 on GPUs and to bfloat16 on TPUs.

        Raises:
          ValueError: another dtype.
        """
        if dtype not in ("bfloat16", "float32"):
            raise ValueError(f"no peak for products of {dtype!r}; use 'bfloat16' or 'float32'")
        return self.bf16_tflops if dtype == "bfloat16" or self.tf32_tflops is None else self.tf32_tflops


_H100 = Peak("H100 SXM", 989.4, 494.7, 67.0, 3350, 80, 450, 8, 64)
_H100_PCIE = Peak("H100 PCIe", 756, 378, 51, 2000, 80, 64, 8, 64)
_H100_NVL = Peak("H100 NVL", 835.5, 417.5, 60, 3938, 94, 64, 8, 64)
_H200 = Peak("H200", 989.4, 494.7, 67.0, 4800, 141, 450, 8, 64)
_A100_40 = Peak("A100 40 GB", 312, 156, 19.5, 1555, 40, 300, 8, 32)
_A100_80 = Peak("A100 80 GB", 312, 156, 19.5, 2039, 80, 300, 8, 32)
_A100_80_PCIE = Peak("A100 80 GB PCIe", 312, 156, 19.5, 1935, 80, 32, 8, 32)
_L4 = Peak("L4", 121, 60, 30.3, 300, 24, 32, 8, 32)
_V4 = Peak("TPU v4", 275, None, None, 1228, 32, 300, 4096, None)
_V5E = Peak("TPU v5e", 197, None, None, 819, 16, 200, 256, None)
_V5P = Peak("TPU v5p", 459, None, None, 2765, 95, 600, 8960, None)
_V6E = Peak("TPU v6e", 918, None, None, 1640, 32, 448, 256, None)

PEAKS: dict[str, Peak] = {
    "NVIDIA H200": _H200,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H100 PCIe": _H100_PCIE,
    "NVIDIA H100 NVL": _H100_NVL,
    "NVIDIA A100-SXM4-40GB": _A100_40,
    "NVIDIA A100-PCIE-40GB": _A100_40,
    "NVIDIA A100-SXM4-80GB": _A100_80,
    "NVIDIA A100 80GB PCIe": _A100_80_PCIE,
    "NVIDIA L4": _L4,
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
}
"""device_kind -> ceilings. Names are matched exactly: a prefix would give a new model the peak of an old one."""


def lookup(device_kind: str) -> Peak:
    """Ceilings of a device.

    Args:
      device_kind: as `jax.Device.device_kind` gives it.

    Raises:
      UnknownDeviceError: if it is not in the table; a utilisation of a guessed peak would be worth nothing.
    """
    if device_kind not in PEAKS:
        raise UnknownDeviceError(
            f"device {device_kind!r} has no entry in benchmarks/peaks.py: add its datasheet peaks (dense bfloat16 "
            f"TFLOP/s, memory GB/s); known: {', '.join(PEAKS)}"
        )
    return PEAKS[device_kind]
