"""Pickle streams read as data: an interpreter that looks nothing up and calls only what it was given.

The pickle module imports and calls whatever a stream names, so opening a file of somebody else runs their code. Here
the opcodes are decoded by `pickletools` and carried out on a plain stack; a name resolves in a table handed over by
the caller, and any other name stops the reading before anything was built from it.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from data_pipelines.errors import DataError

# Opcodes whose decoded argument is the value.
_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8".split()
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class UnsafePickleError(DataError):
    """A stream that names a function or class outside the allowed ones.

    Attributes:
      name: what it names, e.g. "os.system".
    """

    def __init__(self, where: str, name: str):
        self.where, self.name = where, name
        super().__init__(
            f"{where}: it refers to {name}, and opening it the usual way would run that code; nothing was run. "
            "Only tensors, numbers, strings and plain containers are read: save the state dict alone"
        )

    def __reduce__(self):
        return type(self), (self.where, self.name)


@dataclasses.dataclass(frozen=True)
class Build:
    """A name that the stream may call: the call becomes `function(*args)`.

    Attributes:
      function: builds the value from plain data.
    """

    function: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Reader:
    """What a stream may refer to.

    Attributes:
      names: "module.name" -> `Build`, or a value that stands for the name.
      persistent: persistent id -> value; None: the stream must have none.
      set_state: called with (object, state) for objects that are given a state; it must check the object's type.
      where: file, for messages.
    """

    names: Mapping[str, Any]
    persistent: Callable[[Any], Any] | None
    set_state: Callable[[Any, Any], None]
    where: str

    def load(self, stream: BinaryIO) -> Any:
        """Reads one value; the stream is left behind its last byte.

        Raises:
          UnsafePickleError: if it names anything outside `names`.
          DataError: if it is not a whole, well-formed pickle.
        """
        machine = _Machine(self)
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                machine.step(opcode.name, argument)
            return machine.result()
        except DataError:
            raise
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError) as error:
            raise DataError(f"{self.where}: damaged or no pickle ({type(error).__name__}: {error})") from error


class _Machine:
    """Stack, marks and memo of one stream."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def result(self) -> Any:
        if len(self.stack) != 1 or self.marks:
            raise ValueError(f"{len(self.stack)} values are left at its end")
        return self.stack[0]

    def step(self, name: str, argument: Any) -> None:
        """Carries out one opcode."""
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _SHORT_TUPLES:
            count = _SHORT_TUPLES[name]
            self.stack[-count:] = [tuple(self.need(count))]
        elif name not in ("PROTO", "FRAME", "STOP"):
            handler = getattr(self, f"_op_{name.lower()}", None)
            if handler is None:
                raise ValueError(f"opcode {name} is not supported")
            handler(argument)

    def need(self, count: int) -> list[Any]:
        """The topmost values, which must be there."""
        if len(self.stack) < count:
            raise ValueError("the stack is empty")
        return self.stack[-count:]

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """The values since the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _op_mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _op_pop(self, _: Any) -> None:
        # An empty stack behind a mark: the mark itself is dropped.
        if self.stack:
            self.stack.pop()
        else:
            self.stack = self.marks.pop()

    def _op_pop_mark(self, _: Any) -> None:
        self.pop_mark()

    def _op_dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _op_put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _op_binput = _op_long_binput = _op_put

    def _op_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _op_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _op_binget = _op_long_binget = _op_get

    def _op_tuple(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def _op_list(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def _op_frozenset(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(frozenset(items))

    def _op_dict(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(_pairs(items))

    def _op_append(self, _: Any) -> None:
        item = self.pop()
        _expect(self.stack[-1], list).append(item)

    def _op_appends(self, _: Any) -> None:
        items = self.pop_mark()
        _expect(self.stack[-1], list).extend(items)

    def _op_additems(self, _: Any) -> None:
        items = self.pop_mark()
        _expect(self.stack[-1], set).update(items)

    def _op_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        _expect(self.stack[-1], dict)[key] = value

    def _op_setitems(self, _: Any) -> None:
        items = self.pop_mark()
        _expect(self.stack[-1], dict).update(_pairs(items))

    def _op_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push_name(module, name)

    def _op_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self._push_name(_expect(module, str), _expect(name, str))

    def _push_name(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in self.reader.names:
            raise UnsafePickleError(self.reader.where, full)
        self.stack.append(self.reader.names[full])

    def _op_reduce(self, _: Any) -> None:
        arguments, target = _expect(self.pop(), tuple), self.pop()
        self.stack.append(_expect(target, Build).function(*arguments))

    _op_newobj = _op_reduce

    def _op_build(self, _: Any) -> None:
        state = self.pop()
        self.reader.set_state(self.stack[-1], state)

    def _op_binpersid(self, _: Any) -> None:
        identity = self.pop()
        if self.reader.persistent is None:
            raise ValueError("it refers to objects outside the stream")
        self.stack.append(self.reader.persistent(identity))

    def _op_inst(self, argument: str) -> None:
        raise UnsafePickleError(self.reader.where, argument.replace(" ", "."))


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} where a {kind.__name__} is needed")
    return value


def _pairs(items: list[Any]) -> OrderedDict:
    if len(items) % 2:
        raise ValueError("a key without a value")
    return OrderedDict(zip(items[::2], items[1::2], strict=True))
