"""The input pipeline: planned steps, read by Grain threads straight into fixed-shape host batches.

The position of training is one integer, the next global step: step i is the same whatever the number of threads or
processes and wherever reading started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import grain
import numpy as np
from absl import logging

from data_pipelines.assembler import BatchAssembler, SlideTable, StepSource

__all__ = ["BUFFER_BYTES", "BatchAssembler", "Plan", "PlanSource", "SlideTable", "Source", "StepIterator", "StepSource"]
__all__ += ["check_evaluation", "check_fingerprint", "check_start", "make_eval_dataset", "make_train_dataset"]
__all__ += ["read_options", "rows_of_process"]

BUFFER_BYTES = 256 * 2**20
MIN_BUFFERED_STEPS, MAX_BUFFERED_STEPS = 2, 64
# Beyond one step per thread, a deeper buffer only smooths jitter; for large steps it costs more in fresh pages.
SMOOTHING_BYTES = 32 * 2**20


class Plan(Protocol):
    """What reading needs of a plan, of bags (`plan.PackPlan`) or of image pairs (`pairs.steps.PairPlan`).

    Attributes:
      epochs: number of planned epochs.
      steps_per_epoch: steps of every epoch.
      rows: what the processes divide among them.
      parameters: what it was computed from; `mode` is "evaluation" for one exact pass.
    """

    epochs: int
    steps_per_epoch: int
    rows: int
    parameters: Mapping[str, Any]

    def step(self, epoch: int, index: int) -> Any:
        """Step `index` of `epoch`."""


class Source(Protocol):
    """What determines the batches of a run: of bags (`StepSource`) or of image pairs (`pairs.steps.PairSource`).

    Attributes:
      plan: the steps.
      num_steps: steps of the whole run.
    """

    plan: Plan
    num_steps: int

    def step_bytes(self, rows: int) -> int:
        """Bytes of `rows` rows of one step."""

    def assembler(self, rows: slice) -> Callable[[Any], dict[str, np.ndarray]]:
        """Makes the host batches of a process that holds some rows of every step."""

    def fingerprint(self) -> str:
        """Whether a saved position means the same batches."""


class PlanSource:
    """Random access to the steps of a plan by global index; step i is step i % steps_per_epoch of its epoch."""

    def __init__(self, plan: Plan):
        self._plan = plan

    def __len__(self) -> int:
        return self._plan.epochs * self._plan.steps_per_epoch

    def __getitem__(self, step: int) -> Any:
        return self._plan.step(*divmod(int(step), self._plan.steps_per_epoch))


def make_train_dataset(
    source: Source,
    *,
    num_threads: int = 4,
    buffer_bytes: int = BUFFER_BYTES,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Grain data set of the host batches from `start_step` to the end of the plan.

    Its Grain state counts steps from `start_step`; `StepIterator` keeps the global position.

    Args:
      source: what to read.
      num_threads: reader threads; each assembles whole steps. 0 reads in the calling thread.
      buffer_bytes: bound on the bytes of prefetched steps; at least 2 steps are always buffered.
      start_step: global step of the first batch.
      process_index: this process.
      process_count: processes that share the rows of every step, in contiguous blocks.

    Returns:
      An iterable data set of dicts of NumPy arrays.

    Raises:
      ValueError: if the start lies outside the plan or the rows cannot be divided among the processes.
    """
    check_start(source, start_step)
    rows = rows_of_process(source.plan.rows, process_index, process_count)
    options = read_options(source.step_bytes(rows.stop - rows.start), num_threads, buffer_bytes)
    steps = grain.MapDataset.source(PlanSource(source.plan))[start_step:]
    return steps.map(source.assembler(rows)).to_iter_dataset(options)


def make_eval_dataset(
    source: Source,
    *,
    num_threads: int = 4,
    buffer_bytes: int = BUFFER_BYTES,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Grain data set of one exact pass: every slide once, all its patches, the same number of steps on all processes.

    Args:
      source: what to read; its plan must come from `packing.plan_evaluation`.
      num_threads: see `make_train_dataset`.
      buffer_bytes: see `make_train_dataset`.
      process_index: this process.
      process_count: number of processes.

    Returns:
      An iterable data set of dicts of NumPy arrays.

    Raises:
      ValueError: if the plan was made for training, which may skip or repeat slides.
    """
    check_evaluation(source)
    return make_train_dataset(
        source,
        num_threads=num_threads,
        buffer_bytes=buffer_bytes,
        process_index=process_index,
        process_count=process_count,
    )


class StepIterator(Iterator[dict[str, np.ndarray]]):
    """Iterates over training batches and knows its position; resuming equals never having stopped.

    Args:
      source: what to read.
      start_step: global step of the first batch.
      **options: further arguments of `make_train_dataset`.

    Attributes:
      next_step: global index of the step that `next` returns.
    """

    def __init__(self, source: Source, *, start_step: int = 0, **options: int):
        self._source, self._options = source, options
        self._fingerprint = source.fingerprint()
        self._open(start_step)

    def _open(self, step: int) -> None:
        self.next_step = step
        self._iterator = iter(make_train_dataset(self._source, start_step=step, **self._options))

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self.next_step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Position and identity of the batches; independent of the number of threads and processes."""
        return {"next_step": self.next_step, "fingerprint": self._fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues at a saved position.

        Args:
          state: what `get_state` returned.

        Raises:
          ValueError: if it was saved with another data set, plan or slot values.
        """
        check_fingerprint(state["fingerprint"], self._fingerprint)
        self._open(int(state["next_step"]))


def check_start(source: Source, start_step: int) -> None:
    """Refuses to start outside the plan.

    Raises:
      ValueError: unless 0 <= start_step <= number of steps.
    """
    if not 0 <= start_step <= source.num_steps:
        raise ValueError(f"start_step is {start_step}; the plan has steps 0 to {source.num_steps}: raise max_epochs")


def check_evaluation(source: Source) -> None:
    """Refuses to evaluate on a plan that was made for training, which may skip or repeat slides.

    Raises:
      ValueError: unless the plan comes from `packing.plan_evaluation`.
    """
    mode = source.plan.parameters.get("mode")
    if mode != "evaluation":
        raise ValueError(f"plan has mode {mode!r}; evaluation must read each slide once: use plan_evaluation")


def check_fingerprint(saved: str, current: str) -> None:
    """Refuses to resume on other batches.

    Args:
      saved: fingerprint in the checkpoint.
      current: fingerprint of the present source.

    Raises:
      ValueError: if they differ.
    """
    if saved != current:
        raise ValueError(
            f"cannot resume: the saved position belongs to input {saved[:12]}, this run reads {current[:12]}. "
            "Data set, tables, sampling or packing options changed: restore them, or start a new run in another workdir"
        )


def rows_of_process(rows: int, process_index: int, process_count: int) -> slice:
    """Contiguous block of the R rows of a step that one process holds.

    Args:
      rows: R.
      process_index: 0 <= process_index < process_count.
      process_count: number of processes.

    Returns:
      slice with explicit start and stop.

    Raises:
      ValueError: if R is not divisible by the number of processes or the index is out of range.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}; expected 0 to {process_count - 1}")
    if rows % process_count:
        raise ValueError(f"a step has {rows} rows for {process_count} processes; choose a multiple of the processes")
    local = rows // process_count
    return slice(process_index * local, (process_index + 1) * local)


def read_options(step_bytes: int, num_threads: int, buffer_bytes: int) -> grain.ReadOptions:
    """Threads and buffer such that prefetched steps stay within a number of bytes (Grain's default is 500 elements).

    One step per thread is buffered, more only while they are small in total (`SMOOTHING_BYTES`).

    Args:
      step_bytes: bytes of one step on this process.
      num_threads: wanted threads; reduced to the number of buffered steps, since each fills one.
      buffer_bytes: bound on buffered bytes; at least `MIN_BUFFERED_STEPS` steps are buffered even if they exceed it.

    Returns:
      Options for `to_iter_dataset`.
    """
    if num_threads == 0:
        return grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    wanted = max(num_threads, SMOOTHING_BYTES // step_bytes)
    steps = int(np.clip(min(wanted, buffer_bytes // step_bytes), MIN_BUFFERED_STEPS, MAX_BUFFERED_STEPS))
    threads = min(num_threads, steps)
    logging.info(
        "input: %d threads, %d buffered steps x %.1f MiB = %.0f MiB",
        threads,
        steps,
        step_bytes / 2**20,
        steps * step_bytes / 2**20,
    )
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=steps)
