"""The closed-form rule behind tests/golden: parameters, inputs, and comparison with stated tolerances."""

import csv
import functools
import json
import math
import pathlib
import zlib

import numpy as np

FLOAT64, FLOAT32 = "float64", "float32"


def noise(label, shape):
    """Unit-variance numbers in [-sqrt3, sqrt3), a pure function of the label and the flat index."""
    n, s = int(np.prod(shape)), zlib.crc32(label.encode())
    x = np.arange(1, n + 1, dtype=np.uint32) * np.uint32(2654435761) + np.uint32((40503 * (s + 1)) & 0xFFFFFFFF)
    for _ in range(2):
        x ^= x >> np.uint32(16)
        x *= np.uint32(73244475)
    x ^= x >> np.uint32(16)
    return (math.sqrt(3) * (x / 2.0**31 - 1)).reshape(shape)


def fill(label, shape):
    """One parameter: kernels scaled by fan-in, norm scales around 1, other vectors 0.1 u; scalars (MoMKD) ln 0.2."""
    if not shape:
        return np.array(math.log(0.2))
    u = noise(label, shape)
    if len(shape) >= 2:
        return u / math.sqrt(math.prod(shape[1:]))
    return 1 + 0.1 * u if label.endswith("weight") else 0.1 * u


def inputs(name, shape):
    return noise(f"input:{name}", shape)


def load(folder: pathlib.Path, name: str, case: str = "default"):
    """One case of a golden file, with `prefix` added."""
    return json.loads((folder / f"{name}.json").read_text())["cases"][case]


def key_table(folder: pathlib.Path, name: str):
    """Rows of NAME_keys.tsv: dicts of key, shape, stream, first_value, sum, used_in_forward."""
    return key_table_file(folder / f"{name}_keys.tsv")


def key_table_file(path: pathlib.Path):
    """As `key_table`, of any file."""
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    for row in rows:
        row["shape"] = tuple(int(n) for n in row["shape"].split(",") if n)
    return rows


def state_dict(folder: pathlib.Path, name: str, extra_shapes=None, drop=()):
    """{checkpoint key: float64 array} of a model, dead tensors included, without keys that start with one of `drop`."""
    shapes = {row["key"]: row["shape"] for row in key_table(folder, name)}
    shapes.update({f"{name}:{k}": v for k, v in (extra_shapes or {}).items()})
    names = {key.split(":", 1)[1]: (key, shape) for key, shape in shapes.items()}
    return {short: fill(*full) for short, full in names.items() if not short.startswith(tuple(drop))}


@functools.lru_cache(maxsize=32)
def _noise_of_probe(size):
    return noise("probe", (size,))


def _probe(size):
    # Element i does not depend on the size, so that one array serves every size up to a power of two.
    return _noise_of_probe(1 << (size - 1).bit_length())[:size]


def _digest(value):
    flat = np.asarray(value, np.float64).reshape(-1)
    sample = flat[[(j * flat.size) // 32 for j in range(32)]]
    return flat.sum(), np.linalg.norm(flat), flat @ _probe(flat.size), sample


def assert_output(golden, value, precision, name=""):
    """An output against its golden record, at the tolerance of the golden README, section 4."""
    value = np.asarray(value, np.float64)
    assert value.size == math.prod(golden["shape"]), f"{name}: {value.shape} against {golden['shape']}"
    if "digest64" in golden:
        digest = golden["digest64"]
        _, l2, probe, sample = _digest(value)
        expected, actual = np.array([digest["l2"], digest["probe"], *digest["sample"]]), np.array([l2, probe, *sample])
    else:
        expected, actual = np.array(golden["float64"]).reshape(-1), value.reshape(-1)
    largest = np.abs(expected).max()
    tol = 1e-10 * largest if precision == FLOAT64 else max(10 * golden["f32_max_abs_diff"], 1e-5 * largest)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol, err_msg=name)


def assert_gradients(case, gradients, precision):
    """Every parameter gradient (checkpoint layout, keys with prefix) against norms, probes and details of a case."""
    golden = {k: v for k, v in case["grad_l2_probe"].items() if v is not None}
    assert set(golden) == set(gradients)
    floor = 1e-6 * max(v[0] for v in golden.values())
    for key, (l2, probe) in golden.items():
        _, actual_l2, actual_probe, _ = _digest(gradients[key])
        tol = _gradient_tolerance(l2, floor, precision)
        np.testing.assert_allclose([actual_l2, actual_probe], [l2, probe], rtol=0, atol=tol, err_msg=key)
    for key, detail in case["grad_detail"].items():
        _assert_detail(key, detail, np.asarray(gradients[key], np.float64), golden[key][0], floor, precision)


def assert_input_gradients(case, gradients, precision):
    """Gradients with respect to the inputs against norms and probes of a case."""
    golden = case["grad_input_l2_probe"]
    assert set(golden) == set(gradients)
    floor = 1e-6 * max(v[0] for v in golden.values())
    for key, (l2, probe) in golden.items():
        _, actual_l2, actual_probe, _ = _digest(gradients[key])
        tol = _gradient_tolerance(l2, floor, precision)
        np.testing.assert_allclose([actual_l2, actual_probe], [l2, probe], rtol=0, atol=tol, err_msg=key)


def _gradient_tolerance(l2, floor, precision):
    # The float64 floor only covers gradients that are zero by symmetry.
    return max(1e-8 * l2, 1e-14) if precision == FLOAT64 else max(1e-4 * l2, floor)


def _assert_detail(key, detail, value, l2, floor, precision):
    if "float64" in detail:
        expected, actual = np.array(detail["float64"]).reshape(-1), value.reshape(-1)
    else:
        expected, actual = np.array(detail["digest64"]["sample"]), _digest(value)[3]
    tol = _gradient_tolerance(l2, floor, precision)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol, err_msg=key)
