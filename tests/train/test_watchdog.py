"""The watchdog with workers that only pretend: who is named, how fast, and with which exit code."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from histokd_jax.train import processes, watchdog
from histokd_jax.train.watchdog import EXIT_LOST, EXIT_PEER, Membership, Peers, Timing, sign_of_life

FAST = Timing(beat=0.05, silence=1.0, grace=0.3)

WORKER = """
import os, signal, sys, time
from histokd_jax.train.watchdog import Channel, Membership, sign_of_life
import pathlib
channel, index, folder = Channel(os.environ), int(sys.argv[1]), sys.argv[2]
sign_of_life(pathlib.Path(folder), index)
while not all((pathlib.Path(folder) / str(k)).exists() for k in (0, 1)):
    time.sleep(0.01)
channel.announce(Membership(folder, index, 2))
print("ready", os.getpid(), flush=True)
"""
# A loaded machine may part two equal ends by more than FAST's grace.
PATIENT = Timing(beat=0.05, silence=5.0, grace=5.0)


def parent(timing):
    return f"""
import sys
from histokd_jax.train.watchdog import Timing, supervise
sys.exit(supervise([sys.executable, "-c", *sys.argv[1:]], Timing({timing.beat}, {timing.silence}, {timing.grace})))
"""


PARENT = parent(FAST)


def supervised(index, folder, then, timing=FAST):
    """A watchdog over a worker that joins and then runs some lines."""
    return subprocess.Popen(
        [sys.executable, "-c", parent(timing), WORKER + then, str(index), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
    )


def pair(folder, first, second, timing=FAST):
    """[(exit code, stderr)] of two processes."""
    started = [supervised(0, folder, first, timing), supervised(1, folder, second, timing)]
    done = [process.communicate(timeout=30)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, done)]


HANG = "time.sleep(60)"


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", EXIT_LOST, "was killed by SIGKILL"),
        ("sys.exit(1)", 1, "ended with exit code 1"),
    ],
    ids=["killed", "failed"],
)
def test_a_hanging_survivor_is_ended_and_the_dead_process_named(tmp_path, end, code, words):
    began = time.monotonic()
    (survivor, said), (dead, _) = pair(tmp_path, HANG, end)
    assert survivor == EXIT_LOST and dead == code
    assert "process 1 of 2 on " in said and words in said and "to continue" in said
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "how", [f"os._exit({EXIT_PEER})", "os.abort()"], ids=["collective failed", "aborted by runtime"]
)
def test_a_survivor_that_ended_first_still_names_the_dead_process(tmp_path, how):
    """The peer's end becomes known only after this worker is gone."""
    (code, said), _ = pair(tmp_path, how, "time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)")
    assert code == EXIT_LOST and "process 1 of 2 on " in said and "SIGKILL" in said


def test_a_host_that_falls_silent_is_named(tmp_path):
    """Both the watchdog and the worker of process 1 die at once, as with their host."""
    survivor = supervised(0, tmp_path, HANG)
    gone = supervised(1, tmp_path, HANG)
    pid = int(gone.stdout.readline().split()[1])
    gone.kill()
    _, said = survivor.communicate(timeout=30)
    assert survivor.returncode == EXIT_LOST
    assert "process 1 of 2 on " in said and "gave no sign of life" in said
    gone.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while pathlib.Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not pathlib.Path(f"/proc/{pid}").exists(), "a worker outlived its watchdog"


def test_processes_that_finish_at_different_times_are_not_lost(tmp_path):
    assert [code for code, _ in pair(tmp_path, "time.sleep(2.5)", "")] == [0, 0]


def test_processes_that_fail_alike_keep_their_own_exit_code(tmp_path):
    for code, said in pair(tmp_path, "sys.exit(1)", "sys.exit(1)", PATIENT):
        assert code == 1 and "lost" not in said


def test_a_signal_asks_the_worker_once_and_its_end_is_no_loss(tmp_path):
    asked = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(130)); print('armed', flush=True); time.sleep(60)"
    started = [supervised(k, tmp_path, asked) for k in (0, 1)]
    for process in started:
        assert process.stdout.readline().startswith("ready") and process.stdout.readline() == "armed\n"
    for process, number in zip(started, (signal.SIGINT, signal.SIGTERM)):
        process.send_signal(number)
    assert [process.wait(20) for process in started] == [130, 130]
    assert not any(process.communicate()[1] for process in started)


def test_a_worker_that_never_joined_passes_its_exit_code(tmp_path):
    done = subprocess.run([sys.executable, "-c", PARENT, "import sys; sys.exit(3)"], timeout=30)
    assert done.returncode == 3


def test_the_cause_is_named_before_those_who_leave_because_of_it(tmp_path):
    peers = Peers(Membership(str(tmp_path), 0, 4), FAST)
    for k in (1, 2, 3):
        sign_of_life(tmp_path, k, 1)
    assert peers.lost() == ""
    sign_of_life(tmp_path, 1, 2, watchdog.LEFT, "repeated")
    sign_of_life(tmp_path, 3, 2, watchdog.KILLED, "the cause")
    assert peers.lost() == "the cause"
    # A file caught in the middle of a write is no news.
    (tmp_path / "3").write_text("{")
    assert peers.lost() == "repeated"


def test_the_watchdog_loads_no_accelerator_library():
    code = (
        "import sys, histokd_jax.train.watchdog, histokd_jax.train.processes; print({'jax', 'numpy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "set()\n", done.stderr


ADDRESS = {"HISTOKD_COORDINATOR": "h:1", "HISTOKD_NUM_PROCESSES": "2", "HISTOKD_PROCESS_ID": "1"}
SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}


def test_processes_are_named_by_options_or_environment():
    want = processes.Group("options", "h:1", 2, 1)
    assert processes.resolve("h:1", 2, 1, {}) == processes.resolve(None, None, None, ADDRESS) == want
    assert processes.resolve(None, None, 0, ADDRESS) == dataclasses.replace(want, index=0), "options win"
    assert processes.resolve(None, None, None, {}) is None
    assert processes.resolve("h:1", 1, 0, {}) is None, "one process runs alone"


@pytest.mark.parametrize(
    ("environ", "cluster"),
    [
        (SLURM, "slurm"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),  # an interactive shell of an allocation
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, None),  # the batch script outside srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "openmpi"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
    ],
    ids=str,
)
def test_clusters_are_recognised(environ, cluster):
    found = processes.resolve(None, None, None, environ)
    assert found == (processes.Group(cluster) if cluster else None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("h:1", None, 0), "--num-processes"),
        ((None, 2, 0), "--coordinator"),
        (("h", 2, 0), "HOST:PORT"),
        (("h:1", 2, 2), "expected 0 to 1"),
    ],
)
def test_incomplete_or_contradictory_names_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        processes.resolve(*arguments, {})
