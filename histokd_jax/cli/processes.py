"""Options and start of a command that may run as several processes."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name the processes where no cluster does."""
    group = parser.add_argument_group("several processes (recognised under SLURM, GKE and on TPU VMs)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, equal on all")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many, equal on all")
    group.add_argument("--process-id", type=int, metavar="K", help="which one this is, from 0")


def run(args: argparse.Namespace, workdir: pathlib.Path, command: Callable[[], None]) -> int:
    """Runs a command here, or as one of several processes under a watchdog.

    Args:
      args: parsed arguments; `args.argv` is the whole command line.
      workdir: run directory, shared by all processes.
      command: what to do; it reports problems by exceptions.

    Returns:
      The exit code.
    """
    from histokd_jax.train import processes, watchdog

    group = processes.resolve(args.coordinator, args.num_processes, args.process_id, os.environ)
    if group is None:
        command()
        return 0
    if not watchdog.is_worker(os.environ):
        return watchdog.supervise([sys.executable, "-m", "histokd_jax.cli.main", *args.argv[1:]])
    from histokd_jax.train.signals import Interrupted

    channel = watchdog.Channel(os.environ)
    try:
        _work(group, channel, workdir, command)
    except Interrupted:
        # Agreed by all processes, which therefore can end in order.
        raise
    except BaseException as error:
        _end_without_peers(error, args.command)
    return 0


def _work(group, channel, workdir: pathlib.Path, command: Callable[[], None]) -> None:
    from data_pipelines.atomic import storage_errors
    from histokd_jax.train import distributed

    distributed.initialize(group)
    with storage_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    distributed.join_watchdogs(channel, workdir)
    command()


def _end_without_peers(error: BaseException, command: str) -> None:
    """Ends the worker without the orderly end of JAX, which would wait for processes that may be gone."""
    import jax

    from histokd_jax.cli import errors
    from histokd_jax.train import distributed, watchdog

    code, text = errors.explain(error, command)
    if any(isinstance(cause, jax.errors.JaxRuntimeError) for cause in _causes(error)):
        code = watchdog.EXIT_PEER
    if text:
        print(text, file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if distributed.hosts_the_service():
        # The others are aborted when it goes; an error that all of them met should be theirs to report.
        time.sleep(2)
    os._exit(code)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
