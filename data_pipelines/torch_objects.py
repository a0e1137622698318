"""What a PyTorch file may refer to, rebuilt with NumPy: storages, tensors, dtypes, and NumPy's own arrays."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.safe_pickle import Build


@dataclasses.dataclass(frozen=True)
class TorchType:
    """An element type of PyTorch.

    Attributes:
      name: as in torch.NAME.
      stored: NumPy type of the bytes, in the byte order of this machine.
      result: NumPy type of the arrays given out: `stored`, but float32 for bfloat16, which NumPy does not have.
    """

    name: str
    stored: np.dtype
    result: np.dtype


def _type(name: str, stored: str, result: str = "") -> TorchType:
    return TorchType(name, np.dtype(stored), np.dtype(result or stored))


TYPES: dict[str, TorchType] = {
    kind.name: kind
    for kind in (
        *(_type(name, name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8")),
        *(_type(name, name) for name in ("uint16", "uint32", "uint64", "bool", "complex64", "complex128")),
        _type("bfloat16", "uint16", "float32"),
    )
}
# Names of typed storages; newer types (uint16, ...) are kept in untyped ones and name their dtype with the tensor.
STORAGES: dict[str, TorchType] = {
    f"torch.{name}Storage": TYPES[kind]
    for name, kind in {
        **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool"},
        **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"},
        **{"ComplexFloat": "complex64", "ComplexDouble": "complex128"},
    }.items()
}
UNTYPED = TorchType("untyped", np.dtype("uint8"), np.dtype("uint8"))
_ALIASES = {"float": "float32", "double": "float64", "half": "float16", "long": "int64", "int": "int32"}


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """A run of elements that tensors look into.

    Attributes:
      kind: element type.
      elements: [numel], of `kind.result`.
    """

    kind: TorchType
    elements: np.ndarray

    def viewed_as(self, kind: TorchType) -> Storage:
        """The same bytes of an untyped storage as elements of another type."""
        return Storage(kind, decode(self.elements, kind, big_endian=False))


def decode(data: np.ndarray, kind: TorchType, big_endian: bool) -> np.ndarray:
    """Bytes as elements; without a copy where the types of file and machine agree.

    Args:
      data: [n] uint8.
      kind: element type.
      big_endian: byte order of the file.

    Returns:
      [n / itemsize] of `kind.result`.
    """
    stored = kind.stored.newbyteorder(">" if big_endian else "<")
    values = data.view(stored)
    if kind.name == "bfloat16":
        # bfloat16 is the upper half of a float32.
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values if stored == kind.result else values.astype(kind.result)


def tensor(storage: Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    """A tensor as a view of its storage (torch._utils._rebuild_tensor_v2; gradient flags and hooks are ignored).

    Args:
      storage: where its elements lie.
      offset: of the first one, in elements.
      size: shape.
      stride: per axis, in elements.

    Returns:
      A read-only array.

    Raises:
      ValueError: if the view leaves its storage.
    """
    if not isinstance(storage, Storage) or len(size) != len(stride):
        raise ValueError("a tensor without storage, or with other strides than axes")
    if offset < 0 or min((*size, *stride), default=0) < 0:
        raise ValueError(f"a tensor with offset {offset}, size {size}, strides {stride}")
    elements = storage.elements
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # Without this check a crafted file could read memory beyond the storage.
    if math.prod(size) and last >= elements.size:
        raise ValueError(f"a tensor reaches element {last} of a storage of {elements.size}: truncated file?")
    if not math.prod(size):
        return np.empty(size, elements.dtype)
    steps = [step * elements.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(elements[offset:], size, steps, writeable=False)


def _tensor_v3(storage: Storage, offset: int, size: tuple, stride: tuple, grad: Any, hooks: Any, kind: TorchType, *_):
    return tensor(storage.viewed_as(kind), offset, size, stride)


def _from_type(function: Build, kind: Any, arguments: tuple, state: Any) -> Any:
    # A tensor with attributes of its own; the attributes are dropped.
    return function.function(*arguments)


def _ndarray(kind: Any, shape: tuple, code: Any) -> np.ndarray:
    # numpy.core.multiarray._reconstruct: an empty array that is given its contents later.
    return np.empty(0, np.int8)


def _dtype(code: str, align: Any = False, copy: Any = False) -> np.dtype:
    kind = np.dtype(_text(code), copy=True)
    if kind.hasobject or kind.fields or kind.subdtype:
        raise TypeError(f"NumPy type {code!r} is not a plain one")
    return kind


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where a string is needed")
    return value


def _scalar(kind: np.dtype, data: bytes) -> Any:
    return np.frombuffer(data, _plain(kind), count=1)[0]


def _frombuffer(data: bytes, kind: np.dtype, shape: tuple, order: str) -> np.ndarray:
    return np.frombuffer(data, _plain(kind)).reshape(shape, order=order)


def _plain(kind: Any) -> np.dtype:
    if not isinstance(kind, np.dtype) or kind.hasobject:
        raise TypeError(f"{kind!r} is not a plain NumPy type")
    return kind


def _encode(text: str, encoding: str = "latin1") -> bytes:
    # How protocol 2 writes bytes.
    return _text(text).encode({"latin1": "latin1", "latin-1": "latin1", "utf-8": "utf-8"}[encoding])


def set_state(target: Any, state: Any) -> None:
    """Gives an object that was read its state.

    Args:
      target: a NumPy array or dtype, or an OrderedDict, whose attributes (`_metadata` of a state dict) are dropped.
      state: what the stream says.

    Raises:
      TypeError: for any other object or state.
    """
    if isinstance(target, np.ndarray):
        _, shape, kind, fortran, data = state
        if not isinstance(data, bytes) or math.prod(shape) * _plain(kind).itemsize != len(data):
            raise TypeError("a NumPy array whose bytes do not match its shape")
        target.__setstate__((1, shape, kind, bool(fortran), data))
    elif isinstance(target, np.dtype):
        _, order, *rest = state
        if rest[:3] != [None] * 3 or rest[3] not in (-1, target.itemsize) or order not in ("<", ">", "|", "="):
            raise TypeError(f"NumPy type with state {state}")
        target.__setstate__((3, order, None, None, None, rest[3], target.alignment if rest[3] > 0 else -1, 0))
    elif not isinstance(target, collections.OrderedDict):
        raise TypeError(f"a {type(target).__name__} with a state")


def names() -> dict[str, Any]:
    """Everything a PyTorch file may name, apart from what its persistent ids stand for."""
    table: dict[str, Any] = {
        "collections.OrderedDict": Build(collections.OrderedDict),
        "torch._utils._rebuild_tensor": Build(tensor),
        "torch._utils._rebuild_tensor_v2": Build(tensor),
        "torch._utils._rebuild_tensor_v3": Build(_tensor_v3),
        "torch._utils._rebuild_parameter": Build(lambda data, *_: data),
        "torch._utils._rebuild_parameter_with_state": Build(lambda data, *_: data),
        "torch._tensor._rebuild_from_type_v2": Build(_from_type),
        "torch.Size": Build(lambda size=(): tuple(size)),
        "torch.device": Build(lambda *parts: ":".join(map(str, parts))),
        "torch.Tensor": None,
        "torch.nn.parameter.Parameter": None,
        "torch.storage.UntypedStorage": UNTYPED,
        "_codecs.encode": Build(_encode),
        "numpy.ndarray": None,
        "numpy.dtype": Build(_dtype),
        **STORAGES,
        **{f"torch.{name}": kind for name, kind in TYPES.items()},
        **{f"torch.{alias}": TYPES[name] for alias, name in _ALIASES.items()},
    }
    for module in ("builtins", "__builtin__"):
        table |= {f"{module}.set": Build(set), f"{module}.frozenset": Build(frozenset)}
        table[f"{module}.complex"] = Build(lambda real, imaginary=0.0: complex(float(real), float(imaginary)))
    for module in ("numpy.core", "numpy._core"):
        table |= {f"{module}.multiarray._reconstruct": Build(_ndarray), f"{module}.multiarray.scalar": Build(_scalar)}
        table[f"{module}.numeric._frombuffer"] = Build(_frombuffer)
    return table


def names_without_tensors() -> Mapping[str, Any]:
    """The same names, with tensors left out: for a first look at a file whose storages have not been read."""
    skipped = {name: Build(lambda *_: None) for name in names() if "_rebuild_" in name}
    return names() | skipped
