"""All accelerator benchmarks with one command, without network: each piece in a process of its own, one JSON each.

    python -m benchmarks.gpu_suite --out FOLDER [--only NAME ...] [--minutes 60] [--smoke]

A piece that cannot run here is skipped with the reason; one that fails is reported and the others still run. The
overview is FOLDER/gpu_suite.json; `python -m benchmarks.report --results FOLDER --out FOLDER/report` makes the tables
and plots. --smoke runs every piece with tiny sizes, on a CPU too.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

from benchmarks import common, peaks
from benchmarks.bench_experiment import CANNOT_RUN

DONE, SKIPPED, FAILED = "done", "skipped", "failed"
LOW = ("student_bfloat16_input", "mkd_bfloat16_input", "torch_eager_bfloat16", "torch_compiled_bfloat16")
# Chunks of an accelerator; 512 suits a processor's cache.
CHUNK = ("--chunk", "16384")


@dataclasses.dataclass(frozen=True)
class Piece:
    """One benchmark with its arguments.

    Attributes:
      module: in `benchmarks`.
      arguments: of the full run.
      smoke: of the smoke run, besides --smoke.
    """

    module: str
    arguments: tuple[str, ...] = ()
    smoke: tuple[str, ...] = ()


PIECES = {
    # The paper's 16 slides per step, and steps large enough to fill the chip.
    "step_b16": Piece(
        "bench_step",
        ("--medians", "1000", "10000", *CHUNK, "--resident-gb", "24", "--repeats", "5", "--sides", *LOW),
        ("--sides", "student_bfloat16_input", "torch_eager_bfloat16"),
    ),
    "step_b128": Piece(
        "bench_step",
        (
            *("--medians", "1000", "10000", *CHUNK, "--resident-gb", "48", "--slides-per-step", "128"),
            *("--repeats", "5", "--sides", "student_bfloat16_input", "torch_eager_bfloat16"),
        ),
        ("--slides-per-step", "6", "--sides", "student_bfloat16_input"),
    ),
    "files": Piece("bench_files", ("--medians", "1000", "--compute-dtype", "bfloat16", *CHUNK)),
    "pooling": Piece("bench_pooling"),
    "resident": Piece("bench_resident"),
    "replicas": Piece("bench_replicas"),
    "experiment": Piece("bench_experiment"),
    "profile": Piece(
        "bench_profile", ("--dtype", "bfloat16", "--median", "10000", *CHUNK, "--resident-gb", "16"), ("--median", "20")
    ),
    "compile": Piece("bench_compile"),
    "checkpoint": Piece("bench_checkpoint"),
}


def run_piece(name: str, folder: pathlib.Path, smoke: bool, seconds: float) -> dict[str, Any]:
    """Runs one piece.

    Args:
      name: key of `PIECES`; its result goes to FOLDER/NAME.json.
      folder: existing folder.
      smoke: tiny sizes.
      seconds: time limit.

    Returns:
      {"status": "done" | "skipped" | "failed", "seconds", and "reason" unless done}.
    """
    piece = PIECES[name]
    if importlib.util.find_spec(f"benchmarks.{piece.module}") is None:
        return {"status": SKIPPED, "seconds": 0.0, "reason": f"benchmarks/{piece.module}.py does not exist"}
    if seconds <= 0:
        return {"status": SKIPPED, "seconds": 0.0, "reason": "the time of --minutes was used up"}
    target = folder / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{piece.module}", "--out", str(target)]
    command += ["--smoke", *piece.smoke] if smoke else piece.arguments
    began = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return _ended(FAILED, began, f"stopped after {seconds:.0f} s, the rest of --minutes")
    lines = done.stderr.strip().splitlines() or ["no error output"]
    if done.returncode == CANNOT_RUN:
        return _ended(SKIPPED, began, lines[-1])
    if done.returncode:
        return _ended(FAILED, began, f"exit code {done.returncode}: {lines[-1][:500]}")
    common.check_record(json.loads(target.read_text()))
    return _ended(DONE, began)


def _ended(status: str, began: float, reason: str | None = None) -> dict[str, Any]:
    told = {} if reason is None else {"reason": reason}
    return {"status": status, "seconds": time.perf_counter() - began, **told}


def device() -> tuple[str, int]:
    """(device kind, number of devices) as a child process sees them; this process must not hold their memory."""
    code = "import jax; d = jax.devices(); print(d[0].device_kind); print(len(d))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"JAX finds no device: {done.stderr.strip().splitlines()[-1]}")
    kind, count = done.stdout.strip().splitlines()[-2:]
    return kind, int(count)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the wanted pieces and writes the overview.

    Raises:
      peaks.UnknownDeviceError: before anything runs, on an accelerator without an entry.
    """
    kind, count = device()
    if kind == "cpu" and not args.smoke:
        raise SystemExit("JAX runs on a CPU here: install the extra 'cuda' or 'tpu', or give --smoke")
    if kind != "cpu":
        peaks.lookup(kind)
    folder = args.out
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + args.minutes * 60
    found = {}
    for name in args.only or PIECES:
        print(f"{name} ...", flush=True)
        found[name] = run_piece(name, folder, args.smoke, until - time.monotonic())
        print(f"{name}: {found[name]['status']}. {found[name].get('reason', '')}", flush=True)
    metrics = {name: common.metric([facts["seconds"]], "s") for name, facts in found.items()}
    return common.write_result(
        folder / "gpu_suite.json",
        benchmark="gpu_suite",
        config={"only": list(args.only or PIECES), "minutes": args.minutes},
        metrics=metrics,
        derived={"smoke": args.smoke, "pieces": found},
        notes="Seconds of every piece; their results lie beside this file.",
        devices=(kind, count),
    )


def main() -> None:
    """Command line; the exit code is 1 if a piece failed."""
    arguments = common.parser("gpu_suite", __doc__.splitlines()[0])
    arguments.add_argument("--only", nargs="+", choices=PIECES, help="pieces to run")
    arguments.add_argument("--minutes", type=float, default=60.0, help="limit of the whole suite")
    args = arguments.parse_args()
    if args.out is None:
        arguments.error("give --out FOLDER")
    record = run(args)
    if any(facts["status"] == FAILED for facts in record["derived"]["pieces"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
