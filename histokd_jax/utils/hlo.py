"""What a compiled program communicates, read from its text."""

from __future__ import annotations

import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter")
"""Operations that move data between devices; `ragged-all-to-all` counts as "all-to-all"."""

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
# `%name = TYPE op(`: TYPE is an array or a tuple of them; "-start" begins an asynchronous pair, "-done" ends it.
_LINE = re.compile(rf"=\s+(?P<type>.+?)\s+(?:ragged-)?(?P<op>{'|'.join(COLLECTIVES)})(?P<start>-start)?\(")


def collective_bytes(compiled_text: str) -> dict[str, int]:
    """Bytes of the results of all collectives of a compiled program.

    An operation inside a loop counts once. Both halves of an asynchronous pair count as one operation.

    Args:
      compiled_text: `compiled.as_text()`.

    Returns:
      {kind of collective: bytes}, kinds in `COLLECTIVES` that occur; {} for a program that communicates nothing.

    Raises:
      ValueError: an element type whose size is not known.
    """
    found: dict[str, int] = {}
    for line in compiled_text.splitlines():
        match = _LINE.search(line)
        if match:
            arrays = [_size(*part) for part in _ARRAY.findall(match["type"])]
            # The result of a start is the tuple (operands, results, contexts).
            total = max(arrays) if match["start"] and match["op"] != "all-reduce" else sum(arrays)
            found[match["op"]] = found.get(match["op"], 0) + total
    return found


def _size(dtype: str, shape: str) -> int:
    if dtype in _BITS:
        bits = _BITS[dtype]
    else:
        digits = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
        if digits is None:
            raise ValueError(f"element type {dtype!r} of a collective has no known size")
        bits = int(digits[1])
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8
