"""Several processes as one run: initialisation, agreement before training, and who writes.

Every process executes the same program on the same plan; only process 0 writes JSON, CSV, metrics and reports, while
checkpoints are written by all of them together. Nothing branches on the process around a collective operation.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import os
import pathlib
import secrets
import signal
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from histokd_jax.train import watchdog
from histokd_jax.train.processes import Group
from histokd_jax.train.signals import StopRequest

HEARTBEAT_SECONDS = 30
"""After which JAX's own service ends a run that lost a process, if no watchdog was faster (its default is 100)."""

START_SECONDS = 300
"""How long the processes wait for each other at the start."""


class DisagreementError(ValueError):
    """Processes of one run were started with different configurations, data or versions."""


def initialize(group: Group) -> None:
    """Joins the processes of a run; called once, before any device is used.

    Raises:
      ValueError: the others could not be reached, or the cluster was not understood.
    """
    timeouts = {"initialization_timeout": START_SECONDS, "heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    try:
        if group.coordinator is None:
            jax.distributed.initialize(**timeouts)
        else:
            jax.distributed.initialize(
                group.coordinator, group.count, group.index, cluster_detection_method="deactivate", **timeouts
            )
    except (RuntimeError, ValueError) as error:
        who = f"process {group.index} of {group.count}" if group.coordinator else f"this process ({group.source})"
        where = f" with {group.coordinator}" if group.coordinator else ""
        raise ValueError(
            f"{who} could not join the others{where}: {error}; start every process within {START_SECONDS} s of the "
            "first, with the same coordinator and number of processes, or name them with --coordinator, "
            "--num-processes and --process-id"
        ) from error
    devices = collections.Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        raise ValueError(f"processes have different numbers of devices: {dict(devices)}; give each the same number")
    logging.info("process %d of %d: %s", jax.process_index(), jax.process_count(), jax.local_devices())


def join_watchdogs(channel: watchdog.Channel, directory: pathlib.Path) -> None:
    """Lets the watchdogs of all processes see each other in the run directory.

    Args:
      channel: this worker's line to its watchdog.
      directory: run directory, on a file system that all processes share.

    Raises:
      ValueError: if it is not shared.
    """
    folder = pathlib.Path(broadcast(str(directory.absolute() / watchdog.FOLDER / secrets.token_hex(8))))
    if is_main():
        watchdog.clear(directory)
    barrier("signs of life cleared")
    watchdog.sign_of_life(folder, jax.process_index())
    barrier("signs of life written")
    unseen = [k for k in range(jax.process_count()) if not (folder / str(k)).exists()]
    everywhere = gather(unseen)
    if any(everywhere):
        raise ValueError(
            f"--workdir {directory}: it is not the same folder on all processes (process "
            f"{next(k for k, missing in enumerate(everywhere) if missing)} does not see what others write there); "
            "use a folder on a file system that all hosts share"
        )
    channel.announce(watchdog.Membership(str(folder), jax.process_index(), jax.process_count()))


def is_alone() -> bool:
    """Whether this process is the whole run."""
    return jax.process_count() == 1


def hosts_the_service() -> bool:
    """Whether the other processes depend on this one being alive."""
    return jax.distributed.is_initialized() and is_main()


def is_main() -> bool:
    """Whether this process writes files."""
    return jax.process_index() == 0


def tell(text: str) -> None:
    """One line to the user, from one process, whatever is logged."""
    if is_main():
        print(text, flush=True)


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(value: Any) -> list[Any]:
    """A JSON value of every process, in order of the processes."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes.ravel())]


def broadcast(value: Any) -> Any:
    """The JSON value of process 0, on every process."""
    return gather(value if is_main() else None)[0]


def check_agreement(facts: Mapping[str, Any], what: str) -> None:
    """Refuses to go on if any fact differs between processes. Their hashes travel; the facts only if these differ.

    Args:
      facts: name -> JSON value, e.g. configuration keys, versions, fingerprints.
      what: what they describe, for the message.

    Raises:
      DisagreementError: on every process, naming what differs and where.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).digest()
    digests = np.asarray(multihost_utils.process_allgather(np.frombuffer(digest, np.uint8)))
    if (digests == digests[0]).all():
        return
    raise DisagreementError(disagreement(gather(dict(facts)), what))


def disagreement(found: list[Mapping[str, Any]], what: str) -> str:
    """Text that names the facts that differ and the processes that differ from the majority.

    Args:
      found: facts of every process.
      what: what they describe.
    """
    lines = []
    for key in sorted({key for facts in found for key in facts}):
        values = [json.dumps(facts.get(key), sort_keys=True) for facts in found]
        if len(set(values)) == 1:
            continue
        # On a tie the smallest index, so process 0, is taken to be right.
        usual = max(values, key=values.count)
        odd = {k: value for k, value in enumerate(values) if value != usual}
        shown = ", ".join(f"{value:.60} on process {k}" for k, value in list(odd.items())[:8])
        lines.append(f"{key} ({shown}; {usual:.60} on the other {len(found) - len(odd)})")
    return (
        f"the processes of this run disagree about {what}: {'; '.join(lines)}. "
        "Start all of them with the same command, data and installation"
    )


class AgreedStop(StopRequest):
    """A request to stop that all processes see at the same step, whichever of them received the signal.

    JAX's preemption service spreads the notice beside the computation and chooses a step that no process has passed, so
    asking costs no communication between devices. It must be asked once per step, by all processes alike.
    """

    # Of the whole program, because the service expects steps that never go back.
    _steps = itertools.count(1)

    @property
    def requested(self) -> bool:
        """Whether all processes stop at this step."""
        if self.signal is None:
            if multihost_utils.reached_preemption_sync_point(next(self._steps)):
                self.signal = signal.SIGTERM
        return self.signal is not None

    def __enter__(self) -> AgreedStop:
        # SIGTERM belongs to the preemption service; Ctrl-C joins it.
        self._old[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        return self
