"""Files of torch.save without torch: both layouts, what must be refused, and what is written."""

import collections
import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.safe_pickle import UnsafePickleError
from data_pipelines.torch_file import read_state_dict, read_torch, write_state_dict
from data_pipelines.torch_objects import TYPES, Storage, tensor

DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("complex64", "complex128", "uint16", "uint32", "uint64"),
)
RNG = np.random.default_rng(0)


def written(tmp_path, name="a.pt"):
    tensors = {"a.weight": RNG.normal(size=(3, 4)).astype("f4"), "b": np.int64(7), "empty": np.zeros((0, 2), "f8")}
    write_state_dict(tmp_path / name, tensors)
    return tmp_path / name, tensors


def save(torch, path, value, zipped):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


# --- against torch


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_shape_as_torch_saved_it(tmp_path, name, zipped):
    torch = pytest.importorskip("torch")
    values = {
        str(shape): (torch.arange(max(1, int(np.prod(shape)))).reshape(shape or ()) % 2).to(getattr(torch, name))
        for shape in [(), (1,), (5,), (2, 3), (2, 1, 4)]
    }
    values["none"] = torch.zeros((3, 0), dtype=getattr(torch, name))
    read = read_torch(save(torch, tmp_path / "x.pt", values, zipped))
    for key, value in values.items():
        expected = value.to(torch.float32).numpy() if name == "bfloat16" else value.numpy()
        assert read[key].dtype == expected.dtype and read[key].shape == expected.shape
        np.testing.assert_array_equal(read[key], expected)


@pytest.mark.torch
def test_bfloat16_is_exact(tmp_path):
    torch = pytest.importorskip("torch")
    value = torch.tensor([1.0, -3.140625, 1e-40, float("inf"), float("nan"), 3e38]).to(torch.bfloat16)
    read = read_torch(save(torch, tmp_path / "x.pt", value, True))
    np.testing.assert_array_equal(read, value.float().numpy())


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_strided_views_and_shared_storage(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    base = torch.arange(60.0).reshape(3, 4, 5)
    views = {
        **{"base": base, "t": base.permute(2, 0, 1), "part": base[1:, ::2, 1:4], "row": base[2, 3]},
        **{"expanded": base[0, 0, 2].expand(3, 2), "diagonal": base[0].diagonal(), "last": base[2, 3, 4]},
    }
    read = read_torch(save(torch, tmp_path / "x.pt", views, zipped))
    for key, value in views.items():
        np.testing.assert_array_equal(read[key], value.numpy())
    assert np.shares_memory(read["base"], read["part"])


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_nested_containers_parameters_and_numpy(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    saved = {
        "model": torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "args": [1, -(2**70), 0.25, "text", None, True, (1, 2, 3, 4), {"x": {3, 4}}, b"bytes", 1 + 2j],
        "size": torch.zeros(2, 3).size(),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "array": np.arange(6, dtype=">i4").reshape(2, 3).T,
        "words": np.array(["a", "bcd"]),
        "scalar": np.float64(2.5),
    }
    read = read_torch(save(torch, tmp_path / "x.pt", saved, zipped))
    assert read["args"] == saved["args"] and read["size"] == (2, 3) and read["dtype"] is TYPES["float32"]
    assert read["device"] == "cpu" and read["scalar"] == 2.5 and read["words"].tolist() == ["a", "bcd"]
    np.testing.assert_array_equal(read["array"], saved["array"])
    np.testing.assert_array_equal(read["parameter"], np.ones(2, "f4"))
    assert list(read["model"]) == list(saved["model"])
    for key, value in saved["model"].items():
        np.testing.assert_array_equal(read["model"][key], value.numpy())


@pytest.mark.torch
def test_optimizer_and_protocol_4(tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save({"opt": optimizer.state_dict()}, tmp_path / "x.pt", pickle_protocol=4)
    read = read_torch(tmp_path / "x.pt")["opt"]
    np.testing.assert_array_equal(read["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"].numpy())
    assert read["param_groups"][0]["lr"] == 1e-3


@pytest.mark.torch
def test_big_endian_archive(tmp_path):
    torch = pytest.importorskip("torch")
    path = save(torch, tmp_path / "x.pt", torch.tensor([1.5, 2.0]), True)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "big.pt", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("byteorder"):
                content = b"big"
            if "/data/" in name:
                content = np.frombuffer(content, "<f4").astype(">f4").tobytes()
            # Compressed entries occur where somebody repacked an archive.
            target.writestr(name, content, zipfile.ZIP_DEFLATED)
    read = read_torch(tmp_path / "big.pt")
    assert read.tolist() == [1.5, 2.0] and read.dtype == np.dtype("f4")


@pytest.mark.torch
def test_a_whole_model_is_refused_by_the_name_of_its_class(tmp_path):
    torch = pytest.importorskip("torch")
    for zipped in (True, False):
        path = save(torch, tmp_path / "x.pt", torch.nn.Linear(2, 2), zipped)
        with pytest.raises(UnsafePickleError if zipped else DataError, match="Linear|whole model"):
            read_torch(path)


@pytest.mark.torch
def test_what_is_written_opens_with_weights_only(tmp_path):
    torch = pytest.importorskip("torch")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    tensors = {
        name: (RNG.normal(size=(4, 3)) * 50).astype(name).T
        for name in DTYPES
        if name[:4] != "uint" and name != "bfloat16"
    }
    tensors |= {"byte": np.arange(200, dtype="u1"), "scalar": np.float32(3), "none": np.zeros((2, 0), "f4")}
    tensors["bf"] = np.array([1.5, -2, 3e38], ml_dtypes.bfloat16)
    tensors["größe"] = np.arange(3, dtype=">f8")
    write_state_dict(tmp_path / "x.pt", tensors)
    for mmap in (False, True):
        state = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
        assert type(state) is collections.OrderedDict and list(state) == list(tensors)
        for key, value in tensors.items():
            expected = value.astype("f4") if key == "bf" else value
            got = state[key].float() if key == "bf" else state[key]
            assert tuple(got.shape) == value.shape
            np.testing.assert_array_equal(got.numpy(), expected)
    assert state["bf"].dtype == torch.bfloat16


# --- refusals


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("layout", ["zip", "legacy"])
@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_code_is_refused_by_name_and_not_run(tmp_path, layout, protocol):
    marker, path = tmp_path / "executed", tmp_path / "evil.pt"
    body = pickle.dumps({"weight": Evil(marker)}, protocol=protocol)
    if layout == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("evil/data.pkl", body)
    else:
        head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in head) + body)
    for read in (read_torch, read_state_dict):
        with pytest.raises(UnsafePickleError, match=r"(posix|nt)\.system.*nothing was run") as caught:
            read(path)
        assert pickle.loads(pickle.dumps(caught.value)).name == caught.value.name
    assert not marker.exists()
    pickle.loads(body)
    assert marker.exists(), "the test's payload works, so its absence above means something"


@pytest.mark.parametrize(
    "body",
    [
        b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
        b"\x80\x02c__builtin__\ngetattr\n.",
        b"\x80\x02(S'x'\nios\nsystem\n.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.",
        b"\x80\x02ctorch\nload\n.",
    ],
)
def test_other_ways_to_name_code(tmp_path, body):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a/data.pkl", body)
    with pytest.raises(UnsafePickleError):
        read_torch(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "body",
    [
        b"\x80\x02X\x01\x00\x00\x00a)R.",  # calls a string
        b"\x80\x02\x82\x01.",  # extension registry
        b"\x80\x02}X\x01\x00\x00\x00a}b.",  # gives a dict a state
        b"\x80\x02ctorch\nFloatStorage\n}b.",  # gives a type a state
        b"\x80\x02]X\x01\x00\x00\x00aX\x01\x00\x00\x00bs.",  # item of a list by name
        b"\x80\x02(K\x01.",  # open mark
        b"\x80\x02R.",  # empty stack
        b"\x80\x02h\x07.",  # memo never written
        b"\x80\x02]]",  # no end
        b"\x80\x02cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R.",  # Python objects in an array
        b"\x80\x02U\x01aQ.",  # a persistent id that is no storage
    ],
)
def test_malformed_streams_are_bad_data(tmp_path, body):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a/data.pkl", body)
    with pytest.raises(DataError, match="x.pt"):
        read_torch(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("offset", "size", "stride"), [(0, (5,), (1,)), (3, (2,), (1,)), (0, (2, 2), (2, 2)), (4, (), ())]
)
def test_a_view_outside_its_storage_is_refused(offset, size, stride):
    storage = Storage(TYPES["float32"], np.zeros(4, "f4"))
    with pytest.raises(ValueError, match="storage of 4"):
        tensor(storage, offset, size, stride)
    for bad in [(-1, (1,), (1,)), (0, (-1,), (1,)), (0, (2,), (-1,)), (0, (2,), ())]:
        with pytest.raises(ValueError, match="tensor with"):
            tensor(storage, *bad)


@pytest.mark.parametrize("keep", [0, 1, 3, 10, 0.2, 0.5, 0.9, -1])
def test_truncated_zip(tmp_path, keep):
    path, _ = written(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(DataError, match="a.pt"):
        read_torch(path)


@pytest.mark.torch
def test_truncated_legacy_at_every_length(tmp_path):
    torch = pytest.importorskip("torch")
    path = save(torch, tmp_path / "x.pt", {"a": torch.arange(4.0), "b": torch.arange(3)}, False)
    content = path.read_bytes()
    for keep in range(0, len(content), 3):
        path.write_bytes(content[:keep])
        with pytest.raises(DataError, match="x.pt"):
            read_torch(path)


@pytest.mark.parametrize("content", [b"not a model", b"\x89HDF\r\n\x1a\n", b"\x80\x02N.", bytes(100), b"(" * 1000])
def test_other_files(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(DataError, match="not a file of torch.save"):
        read_torch(tmp_path / "x.pth")


def test_other_archives_and_missing_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", b"")
    with pytest.raises(DataError, match="no FOLDER/data.pkl"):
        read_torch(tmp_path / "x.npz")
    for name in ("missing.pt", "missing.safetensors"):
        with pytest.raises(FileNotFoundError):
            read_state_dict(tmp_path / name)


def test_a_missing_or_short_storage_is_named(tmp_path):
    path, _ = written(tmp_path)
    for change, message in ((lambda c: None, "data/0 is missing"), (lambda c: c[:-4], "data/0 has 44 bytes, not 12")):
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "b.pt", "w") as target:
            for name in source.namelist():
                content = source.read(name) if name != "archive/data/0" else change(source.read(name))
                if content is not None:
                    target.writestr(name, content)
        with pytest.raises(DataError, match=message):
            read_torch(tmp_path / "b.pt")


# --- state dicts


def test_written_and_read_back_bit_for_bit(tmp_path):
    path, tensors = written(tmp_path)
    read = read_state_dict(path)
    assert list(read) == list(tensors)
    for key, value in tensors.items():
        assert read[key].dtype == value.dtype
        np.testing.assert_array_equal(read[key], value)
    assert not read["a.weight"].flags.writeable
    other, _ = written(tmp_path, "b.pt")
    write_state_dict(other, tensors)
    assert other.read_bytes() == path.read_bytes(), "equal tensors, equal files"
    for entry in zipfile.ZipFile(path).infolist():
        start = entry.header_offset + 30 + len(entry.filename) + len(entry.extra)
        assert start % 64 == 0


def test_types_without_a_storage_are_refused_on_writing(tmp_path):
    with pytest.raises(DataError, match="'w' has type uint16"):
        write_state_dict(tmp_path / "x.pt", {"w": np.zeros(2, "u2")})
    assert not (tmp_path / "x.pt").exists()


def test_wrappers_of_state_dicts_are_opened(tmp_path):
    from data_pipelines.torch_file import state_dict_of, strip_prefix

    one = np.ones(1)
    state = {"module.a.weight": one, "module.net.module.0.bias": one}
    short = ["a.weight", "net.module.0.bias"]
    for saved in (state, {"epoch": 3, "state_dict": state}, {"model": {"state_dict": state}}, {"net": state}):
        assert list(strip_prefix(state_dict_of(saved, "f"))) == short
    with pytest.raises(DataError, match="f: 'epoch' \\(int\\)"):
        state_dict_of({"epoch": 3}, "f")
    with pytest.raises(DataError, match="empty"):
        state_dict_of({}, "f")
    with pytest.raises(DataError, match="holds a ndarray"):
        state_dict_of(one, "f")
    assert list(strip_prefix({"module.a": one, "a": one})) == ["module.a", "a"]
    assert list(strip_prefix({"module.module.a": one})) == ["a"]


def test_safetensors_behind_the_same_call(tmp_path):
    pytest.importorskip("safetensors")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    from safetensors.numpy import save_file

    path = tmp_path / "x.safetensors"
    save_file({"module.a": np.arange(6.0).reshape(2, 3), "module.b": np.arange(2, dtype="i4")}, path)
    read = read_state_dict(path)
    assert set(read) == {"a", "b"} and read["b"].dtype == np.dtype("i4")
    np.testing.assert_array_equal(read["a"], np.arange(6.0).reshape(2, 3))
    save_file({"w": np.array([1.5, -2.0], ml_dtypes.bfloat16)}, path)
    assert read_state_dict(path)["w"].dtype == np.float32 and read_state_dict(path)["w"].tolist() == [1.5, -2.0]
    path.write_bytes(b"\x00" * 9)
    with pytest.raises(DataError, match="x.safetensors"):
        read_state_dict(path)


# --- real checkpoints

CLAM = {
    "attention_net.module.0.weight": (512, 1024),
    "attention_net.module.0.bias": (512,),
    "attention_net.module.3.attention_a.0.weight": (256, 512),
    "attention_net.module.3.attention_b.0.bias": (256,),
    "attention_net.module.3.attention_c.weight": (1, 256),
    "classifiers.weight": (2, 512),
    "instance_classifiers.1.weight": (2, 512),
}
DSMIL = {
    "i_classifier.fc.0.weight": (2, 512),
    "b_classifier.q.0.weight": (128, 512),
    "b_classifier.q.2.weight": (128, 128),
    "b_classifier.fcc.weight": (2, 2, 512),
}


@pytest.mark.real_data
@pytest.mark.parametrize(("file", "shapes"), [("clam/s_0_checkpoint.pt", CLAM), ("dsmil/tcga_aggregator.pth", DSMIL)])
def test_published_checkpoints_load_without_torch(real_data, file, shapes):
    path = real_data / "reference_checkpoints" / file
    state = read_state_dict(path)
    assert {key: state[key].shape for key in shapes} == shapes
    assert all(np.isfinite(value).all() for value in state.values())
    with open(path, "rb") as stream:  # the last storage ends where the file (legacy) or its entry ends
        content = stream.read()
    for key in shapes:
        assert np.ascontiguousarray(state[key]).tobytes() in content


@pytest.mark.real_data
@pytest.mark.torch
@pytest.mark.parametrize("file", ["clam/s_0_checkpoint.pt", "dsmil/tcga_aggregator.pth"])
def test_published_checkpoints_equal_torch(real_data, file):
    torch = pytest.importorskip("torch")
    path = real_data / "reference_checkpoints" / file
    expected = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    read = read_torch(path)
    assert list(read) == list(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(read[key], value.numpy())
