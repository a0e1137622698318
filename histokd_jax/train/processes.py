"""Which processes share a run: given by hand, or recognised from the cluster. Standard library only.

The watchdog reads this before any JAX is imported; `histokd_jax.train.distributed` acts on it.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
from collections.abc import Mapping

VARIABLES = ("HISTOKD_COORDINATOR", "HISTOKD_NUM_PROCESSES", "HISTOKD_PROCESS_ID")
OPTIONS = ("--coordinator", "--num-processes", "--process-id")


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes of one run.

    Attributes:
      source: what told so: "options", or the name of a cluster whose details JAX finds out.
      coordinator: host:port of process 0; None: found by JAX, as are the other two.
      count: number of processes.
      index: this process.
    """

    source: str
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None


def resolve(coordinator: str | None, count: int | None, index: int | None, environ: Mapping[str, str]) -> Group | None:
    """The group this process belongs to, or None if it runs alone.

    Args:
      coordinator: --coordinator; None: taken from the environment, as the other two.
      count: --num-processes.
      index: --process-id.
      environ: environment variables.

    Raises:
      ValueError: only some of the three are given, or they contradict each other.
    """
    given = [
        environ.get(name) if value is None else str(value)
        for name, value in zip(VARIABLES, (coordinator, count, index))
    ]
    if not any(given):
        cluster = detect(environ)
        return None if cluster is None else Group(cluster)
    names = [f"{option} (or {name})" for option, name in zip(OPTIONS, VARIABLES)]
    missing = [name for name, value in zip(names, given) if not value]
    if missing:
        raise ValueError(f"a run of several processes also needs {' and '.join(missing)}")
    host, colon, port = given[0].rpartition(":")
    if not (host and colon and port.isdigit()):
        raise ValueError(f"--coordinator {given[0]}: expected HOST:PORT, the address of process 0")
    numbers = []
    for name, text in zip(names[1:], given[1:]):
        if not text.isdigit():
            raise ValueError(f"{name} is {text!r}: expected a number")
        numbers.append(int(text))
    if not numbers[1] < numbers[0]:
        raise ValueError(f"--process-id is {numbers[1]}: with {numbers[0]} processes expected 0 to {numbers[0] - 1}")
    return Group("options", given[0], *numbers) if numbers[0] > 1 else None


def detect(environ: Mapping[str, str]) -> str | None:
    """Name of the cluster that started this process as one of several, or None.

    Args:
      environ: environment variables.

    Returns:
      "slurm" (inside srun, more than one task), "openmpi", "kubernetes" (a pod of an indexed Job), "tpu" (a TPU VM), or
      None. Whether JAX is asked to initialise depends on it; the details are JAX's own detection.
    """

    def number(name):
        text = environ.get(name, "")
        return int(text) if text.isdigit() else 0

    # The batch script itself also carries SLURM_NTASKS; only tasks of a step are processes of the run.
    if "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ:
        tasks = number("SLURM_STEP_NUM_TASKS") or number("SLURM_NTASKS")
        if tasks > 1:
            return "slurm"
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        return "openmpi"
    # GKE gives TPU pods the list of their workers; such a slice is recognised as a TPU, not as a Job.
    if environ.get("TPU_WORKER_HOSTNAMES", "").count(",") or _is_tpu_vm():
        return "tpu"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "kubernetes"
    return None


def _is_tpu_vm() -> bool:
    return importlib.util.find_spec("libtpu") is not None and bool(
        glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    )
