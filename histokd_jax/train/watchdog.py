"""A parent that watches the worker of one process, and knows when another process of the run is lost.

A worker that waits in a collective for a dead peer neither returns nor can be interrupted from Python. So every process
of a run is two: the worker, which trains, and this watchdog, which never touches a device. The watchdogs see each other
through small files in the run directory, which all hosts share anyway for the checkpoints:

    RUN/.processes/TOKEN/K     {"beat": 17, "state": "running", "host": "node3", ...}

Silence is measured by the reader's own clock, so that clocks need not agree. A process that dies, or whose host falls
silent, is named by all others, which end with `EXIT_LOST`. Standard library only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

EXIT_LOST = 75
"""Exit code of a run that lost a process: temporary failure, run the same command again."""

EXIT_PEER = 76
"""Exit code of a worker whose collective operation failed; the watchdog finds out why."""

EXIT_INTERRUPTED = 130
CHANNEL = "HISTOKD_WATCHDOG_CHANNEL"
FOLDER = ".processes"

# FINISHED: code 0; STOPPED: on request; KILLED: by a signal; FAILED: ended with an error of its own; LEFT: a peer did.
RUNNING, FINISHED, STOPPED, KILLED, FAILED, LEFT = "running", "finished", "stopped", "killed", "failed", "left"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds.

    Attributes:
      beat: between two signs of life.
      silence: after which a process without a sign of life counts as lost.
      grace: that a worker gets to end by itself once a peer is lost.
    """

    beat: float = 1.0
    silence: float = 20.0
    grace: float = 5.0


@dataclasses.dataclass(frozen=True)
class Membership:
    """What a worker tells its watchdog once the processes have found each other.

    Attributes:
      folder: where the signs of life of this launch lie.
      index: this process.
      count: number of processes.
    """

    folder: str
    index: int
    count: int


class Channel:
    """The worker's end of the line to its watchdog; the worker ends when the line is cut.

    Args:
      environ: environment variables.
    """

    def __init__(self, environ: Mapping[str, str]):
        self._socket = socket.socket(fileno=int(environ[CHANNEL]))
        # The number means nothing to processes that this one starts.
        os.environ.pop(CHANNEL, None)
        threading.Thread(target=self._end_with_the_watchdog, daemon=True).start()

    def _end_with_the_watchdog(self) -> None:
        # Nothing is ever sent this way: reading returns, or fails, when the watchdog is gone.
        with contextlib.suppress(OSError):
            self._socket.recv(1)
        os._exit(EXIT_LOST)

    def announce(self, membership: Membership) -> None:
        """Tells the watchdog whom to watch; every process must have called `sign_of_life` before."""
        self._socket.sendall(json.dumps(dataclasses.asdict(membership)).encode() + b"\n")


def is_worker(environ: Mapping[str, str]) -> bool:
    """Whether this process was started by a watchdog."""
    return CHANNEL in environ


def sign_of_life(folder: pathlib.Path, index: int, beat: int = 0, state: str = RUNNING, cause: str = "") -> None:
    """Writes the file of one process, in place: a network file system shows new content when a file is opened again."""
    text = json.dumps({"beat": beat, "state": state, "cause": cause, "host": socket.gethostname()})
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / str(index), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        # One write of fixed length, so that no remainder of an older text follows.
        os.pwrite(handle, text.ljust(1024).encode(), 0)
    finally:
        os.close(handle)


def _read(folder: pathlib.Path, index: int) -> dict[str, Any] | None:
    try:
        return json.loads((folder / str(index)).read_text())
    except (OSError, ValueError):
        # Absent, or caught in the middle of a write: no news.
        return None


class Peers:
    """The other processes as seen through their files.

    Args:
      membership: who and where.
      timing: see `Timing`.
    """

    def __init__(self, membership: Membership, timing: Timing):
        self._folder, self._timing = pathlib.Path(membership.folder), timing
        self._others = [k for k in range(membership.count) if k != membership.index]
        self._count = membership.count
        self._seen = {k: (-1, time.monotonic()) for k in self._others}
        self._hosts: dict[int, str] = {}

    def lost(self, states: Sequence[str] = (KILLED, FAILED, LEFT)) -> str:
        """Text that names a lost process, or "" if there is none.

        Args:
          states: which ends of a peer count, causes before their consequences; silence always counts.
        """
        now = time.monotonic()
        found = {k: _read(self._folder, k) for k in self._others}
        for k, sign in found.items():
            if sign is not None:
                self._hosts[k] = sign["host"]
                if sign["state"] in (FINISHED, STOPPED):
                    self._seen[k] = (sign["beat"], float("inf"))
                elif sign["beat"] != self._seen[k][0]:
                    self._seen[k] = (sign["beat"], now)
        for state in states:
            for sign in found.values():
                if sign is not None and sign["state"] == state:
                    return sign["cause"]
        for k, (_, heard) in self._seen.items():
            if now - heard > self._timing.silence:
                return name(k, self._count, self._hosts.get(k)) + f" gave no sign of life for {now - heard:.0f} s"
        return ""


def name(index: int, count: int, host: str | None = None) -> str:
    """How a process is called in messages."""
    return f"process {index} of {count}" + (f" on {host}" if host else "")


def supervise(command: Sequence[str], timing: Timing = Timing(), environ: Mapping[str, str] | None = None) -> int:
    """Runs a worker and watches it and its peers.

    Args:
      command: the worker; it calls `Channel.announce` when the processes have found each other.
      timing: see `Timing`.
      environ: environment of the worker; None: this one's.

    Returns:
      The worker's exit code, or `EXIT_LOST` if a process of the run was lost (its name is printed to stderr).
    """
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()
    worker = subprocess.Popen(
        list(command),
        env={**(os.environ if environ is None else environ), CHANNEL: str(fd)},
        pass_fds=(fd,),
        # Ctrl-C of a terminal then reaches this process only, which passes it on once.
        start_new_session=True,
    )
    theirs.close()
    with _passing_signals(worker), ours:
        try:
            return _Watch(worker, ours, timing).run()
        finally:
            if worker.poll() is None:
                worker.kill()
                worker.wait()


@contextlib.contextmanager
def _passing_signals(worker: subprocess.Popen):
    """SIGINT and SIGTERM ask the worker to stop at a step on which all processes agree; both reach it as SIGTERM.

    A second SIGINT ends it at once.
    """

    interrupts = 0

    def handle(number, frame):
        nonlocal interrupts
        del frame
        interrupts += number == signal.SIGINT
        worker.send_signal(signal.SIGTERM if interrupts < 2 else signal.SIGKILL)

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class _Watch:
    """One supervised worker."""

    def __init__(self, worker: subprocess.Popen, channel: socket.socket, timing: Timing):
        self._worker, self._channel, self._timing = worker, channel, timing
        channel.setblocking(False)
        self._text = b""
        self._me: Membership | None = None
        self._peers: Peers | None = None
        self._beat = 0

    def run(self) -> int:
        while (code := self._wait()) is None:
            lost = self._look()
            if lost:
                code = self._wait(self._timing.grace)
                if code == 0:
                    return self._end(0, FINISHED)
                return self._leave(lost)
        if code == 0:
            return self._end(0, FINISHED)
        if code == EXIT_INTERRUPTED:
            return self._end(code, STOPPED)
        self._receive()
        if self._me is None:
            return code if code > 0 else 128 - code
        lost = self._cause(code)
        return self._leave(lost) if lost else self._fail(code)

    def _wait(self, seconds: float | None = None) -> int | None:
        try:
            return self._worker.wait(self._timing.beat if seconds is None else seconds)
        except subprocess.TimeoutExpired:
            return None

    def _receive(self) -> None:
        if self._me is not None:
            return
        with contextlib.suppress(BlockingIOError, ConnectionError):
            self._text += self._channel.recv(65536)
        if self._text.endswith(b"\n"):
            self._me = Membership(**json.loads(self._text))
            self._peers = Peers(self._me, self._timing)

    def _look(self) -> str:
        self._receive()
        if self._me is None:
            return ""
        self._write(RUNNING)
        return self._peers.lost()

    def _write(self, state: str, cause: str = "") -> None:
        self._beat += 1
        # A full or absent disk must not end a run that could go on; the peers notice the silence.
        with contextlib.suppress(OSError):
            sign_of_life(pathlib.Path(self._me.folder), self._me.index, self._beat, state, cause)

    def _cause(self, code: int) -> str:
        """The lost peer because of which the worker ended, or ""."""
        # A worker that was killed is its own cause. One that ended with an error may have met it because a peer was
        # killed. One whose collective failed, or that the runtime aborted, surely lost a peer, but that peer may have
        # to be silent for a while until it can be named.
        if code not in (EXIT_PEER, -signal.SIGABRT):
            return "" if code < 0 else self._peers.lost((KILLED,))
        deadline = time.monotonic() + self._timing.silence + 2 * self._timing.beat
        while not (lost := self._look()) and time.monotonic() < deadline:
            time.sleep(self._timing.beat)
        return lost

    def _leave(self, lost: str) -> int:
        self._write(LEFT, lost)
        self._say(f"{lost}; the newest checkpoint was kept, run the same command on all hosts to continue")
        return EXIT_LOST

    def _fail(self, code: int) -> int:
        killed = code < 0 or code == EXIT_PEER
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if code == EXIT_PEER:
            how = "failed in a device operation (see its error), and no other process is known to be lost"
        mine = f"{name(self._me.index, self._me.count, socket.gethostname())} {how}"
        self._write(KILLED if killed else FAILED, mine)
        # A worker that ended by itself has printed its own message.
        if killed:
            self._say(mine)
        return EXIT_LOST if killed else code

    def _end(self, code: int, state: str) -> int:
        self._receive()
        if self._me is not None:
            self._write(state)
        return code

    def _say(self, text: str) -> None:
        print(f"histokd: {text}", file=sys.stderr, flush=True)


def clear(directory: pathlib.Path) -> None:
    """Removes the signs of life of earlier launches in a run directory."""
    shutil.rmtree(directory / FOLDER, ignore_errors=True)
