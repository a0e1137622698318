"""Real processes on loopback, with forced CPU devices and gloo collectives."""

import os
import socket
import subprocess
import sys
import threading
import time

# The persistent cache serves process 0 only, so the others always compile: cheaply, for the same bits in every run.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def free_port():
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def alive(pid):
    """Whether a process exists and is no zombie (Linux)."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Group:
    """`count` processes of one run; kills what is left of them on exit.

    Args:
      commands: one command line per process, without the options that name the processes.
      devices: forced CPU devices per process.
    """

    def __init__(self, commands, devices=4):
        address = f"127.0.0.1:{free_port()}"
        self.processes, self.errors = [], []
        for k, command in enumerate(commands):
            names = {"COORDINATOR": address, "NUM_PROCESSES": str(len(commands)), "PROCESS_ID": str(k)}
            process = subprocess.Popen(
                [sys.executable, *command],
                env={
                    **os.environ,
                    "JAX_PLATFORMS": "cpu",
                    "JAX_NUM_CPU_DEVICES": str(devices),
                    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
                    "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])),
                    "XLA_FLAGS": QUICK,
                    **{f"HISTOKD_{name}": value for name, value in names.items()},
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self.processes.append(process)
            self.errors.append([])
            # Read all the time, so that no full pipe stops a process.
            for stream, lines in ((process.stderr, self.errors[-1]), (process.stdout, [])):
                threading.Thread(target=lambda s=stream, to=lines: to.extend(s), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def wait(self, timeout=120):
        """Exit codes; raises if any process takes longer than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        codes = [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]
        time.sleep(0.1)
        return codes

    def said(self, index):
        """What a process wrote to stderr so far."""
        return "".join(self.errors[index])

    def worker(self, index):
        """Process id of the worker below a watchdog (Linux)."""
        pid = self.processes[index].pid
        with open(f"/proc/{pid}/task/{pid}/children") as children:
            return int(children.read().split()[0])

    def until(self, condition, timeout=90, *, ended_is_fine=False):
        """Waits for a condition; fails if a process ends before or it takes too long."""
        deadline = time.monotonic() + timeout
        while not condition():
            for k, process in enumerate(self.processes):
                assert ended_is_fine or process.poll() is None, f"process {k} ended early: {self.said(k)}"
            assert time.monotonic() < deadline, self.errors
            time.sleep(0.02)


def train(arguments, count=2):
    """The command lines of `histokd train` with equal arguments."""
    return [["-m", "histokd_jax.cli.main", *arguments]] * count
