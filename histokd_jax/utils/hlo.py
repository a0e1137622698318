"""What a compiled program sends between devices, read from its text (`compiled.as_text()`)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\)\s*->.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_OPERATION = re.compile(r"(?<![\w.\-%])([a-z][\w\-]*)\(")
_CALLED = re.compile(
    r"\b(body|condition|to_apply|calls|called_computations|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')


def collective_bytes(compiled_text: str) -> dict[str, int]:
    """Bytes that one execution of a compiled program hands to collective operations on each device.

    An operation counts the bytes of its result (of its operand for reduce-scatter, which is the larger side). It counts
    as often as it runs: in a loop, times the number of rounds; of a conditional, all branches.

    Args:
      compiled_text: HLO text of a compiled program, e.g. `jax.jit(f).lower(*args).compile().as_text()`.

    Returns:
      operation (one of `COLLECTIVES`) -> bytes; operations that do not occur are absent.

    Raises:
      ValueError: the text is no HLO module, or a collective sits in a loop whose number of rounds is not in the text.
    """
    computations, entry = _computations(compiled_text)
    total: dict[str, int] = {}
    _count(entry, 1, computations, total)
    return dict(sorted(total.items()))


def collective_total(compiled_text: str) -> int:
    """Sum of `collective_bytes` over the operations."""
    return sum(collective_bytes(compiled_text).values())


def shape_bytes(text: str) -> int:
    """Bytes of all array shapes in a piece of HLO text, e.g. "(f32[2,3]{1,0}, bf16[4])" -> 32.

    Raises:
      ValueError: an element type of unknown size.
    """
    return sum(_array_bytes(kind, dims) for kind, dims in _SHAPE.findall(text))


def _array_bytes(kind: str, dims: str) -> int:
    bits = _BITS.get(kind)
    if bits is None:
        digits = re.match(r"[a-z]+(\d+)", kind)  # f32, bf16, s8, u4, f8e4m3fn, c64
        if not digits:
            raise ValueError(f"element type {kind!r} in the HLO text is unknown; add its size to histokd_jax.utils.hlo")
        bits = int(digits.group(1))
    sizes = [int(d.lstrip("<=")) for d in dims.split(",") if d]
    return -(-math.prod(sizes) * bits // 8)


def _computations(text: str) -> tuple[dict[str, dict[str, str]], str]:
    """Instructions (name -> text after "=") of every computation, and the name of the entry."""
    found: dict[str, dict[str, str]] = {}
    entry, current = None, None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = found.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            current[instruction.group(1)] = instruction.group(2)
    if entry is None:
        raise ValueError("the text holds no ENTRY computation: give compiled.as_text() of a compiled program")
    return found, entry


def _count(name: str, times: int | None, computations: Mapping[str, dict[str, str]], total: dict[str, int]) -> None:
    """Adds the collectives of a computation that runs `times` times (None: unknown)."""
    for line in computations[name].values():
        operation = _OPERATION.search(line)
        kind = operation.group(1) if operation else ""
        base = kind.removesuffix("-start")
        if base in COLLECTIVES:
            if times is None:
                raise ValueError(f"{base} in computation {name!r} sits in a loop whose number of rounds is not known")
            sizes = {key: shape_bytes(_result(text)) for key, text in computations[name].items()}
            total[base] = total.get(base, 0) + times * _payload(line, operation, base, kind != base, sizes)
            continue  # what it applies is the sum of two numbers
        if kind in ("async-update", "async-done"):
            continue  # counted where it starts
        trips = _TRIPS.search(line)
        for role, target in _called(line):
            looped = kind == "while" and role == "body"
            inner = times if not looped or times is None else (times * int(trips.group(1)) if trips else None)
            _count(target, inner, computations, total)


def _result(line: str) -> str:
    operation = _OPERATION.search(line)
    return line[: operation.start()] if operation else line


def _called(line: str) -> list[tuple[str, str]]:
    return [
        (role, name.lstrip("%"))
        for role, names in _CALLED.findall(line)
        for name in re.findall(r"%?[\w.\-]+", names)
        if name
    ]


def _payload(line: str, operation: re.Match, base: str, started: bool, sizes: Mapping[str, int]) -> int:
    result = shape_bytes(line[: operation.start()])
    operands = line[operation.end() : _closing(line, operation.end())]
    given = shape_bytes(operands) or sum(sizes.get(name, 0) for name in re.findall(r"%?([\w.\-]+)", operands))
    if base == "reduce-scatter":
        return given
    # The result of a started operation, but for all-reduce, is (operands, results, context of a few bytes).
    return result - given if started and base != "all-reduce" else result


def _closing(line: str, start: int) -> int:
    depth = 1
    for at in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[at], 0)
        if not depth:
            return at
    return len(line)
