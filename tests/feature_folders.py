"""Feature folders as other software writes them, made by the tests with h5py, NumPy and hand-written bytes."""

import io
import json
import zipfile

import h5py
import numpy as np

BRCA = (
    "TCGA-A1-A0SB-01Z-00-DX1.A",
    "TCGA-A1-A0SD-01Z-00-DX1.B",
    "TCGA-A1-A0SD-01Z-00-DX2.C",
    "TCGA-BH-A0AU-01Z-00-DX1.D",
)


def bag(seed, n=None, dim=8):
    """Features [n, dim] float32 and coords [n, 2] int64."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 40)) if n is None else n
    return rng.normal(size=(n, dim)).astype(np.float32), rng.integers(0, 90_000, (n, 2))


def bags(slides=BRCA, dim=8):
    return {slide: bag(i, dim=dim) for i, slide in enumerate(slides)}


def _parent(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def h5(path, arrays, attrs=None, **options):
    """arrays: name -> array; attrs: name -> {attribute: value}, "" for the file."""
    with h5py.File(_parent(path), "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, **options)
        for name, values in (attrs or {}).items():
            for key, value in values.items():
                (file[name] if name else file).attrs[key] = value
    return path


def tensor_pt(path, array):
    """A bare float32 tensor as torch.save writes it: zip, data.pkl, one storage."""
    rows, width = array.shape

    def number(value):
        return b"J" + value.to_bytes(4, "little")

    pickle = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    pickle += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number(array.size) + b"tQK\x00"
    pickle += number(rows) + number(width) + b"\x86" + number(width) + b"K\x01\x86"
    pickle += b"\x89ccollections\nOrderedDict\n)RtR."
    return zipped(path, pickle, array.astype("<f4").tobytes())


def zipped(path, pickle, storage=b""):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/data/0", storage)
        archive.writestr("archive/version", b"3\n")
    _parent(path).write_bytes(content.getvalue())
    return path


def evil_pt(path, target):
    """A .pt whose pickle would create the file `target` if it were run."""
    return zipped(
        path, b"\x80\x02cos\nsystem\nX" + len(c := f"touch {target}".encode()).to_bytes(4, "little") + c + b"\x85R."
    )


def clam(root, content, *, patches=True, pt=True, h5_files=True):
    for slide, (features, coords) in content.items():
        if h5_files:
            arrays = {"features": features, "coords": coords.astype(np.int32)}
            h5(root / "h5_files" / f"{slide}.h5", arrays, chunks=True, maxshape=None)
        if pt:
            tensor_pt(root / "pt_files" / f"{slide}.pt", features)
        if patches:
            facts = {"patch_size": 256, "patch_level": 1, "downsample": (2.0, 2.0), "name": slide, "save_path": "x"}
            h5(root / "patches" / f"{slide}.h5", {"coords": coords}, {"coords": facts})
    return root


def trident(root, content, *, encoder="uni_v1", job="20x_256px_0px_overlap", legacy=False, dtype=np.float32):
    folder = root / job / f"features_{encoder}"
    for slide, (features, coords) in content.items():
        shared = {"name": slide, "savetodir": "somewhere"}
        facts = {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20}
        facts |= {"overlap": 0, "level0_width": 99_000, "level0_height": 98_000, **shared}
        arrays = {"features": features.astype(dtype), "coords": coords}
        attrs = {"coords": facts, "features": {"encoder": encoder, **shared}}
        if legacy:
            arrays, attrs = {name: array[None] for name, array in arrays.items()}, {"features": {"encoder": "None"}}
        chunks = {} if legacy else {"chunks": (1, features.shape[1])}
        path = h5(folder / f"{slide}.h5", {"coords": arrays.pop("coords")})
        with h5py.File(path, "a") as file:
            file.create_dataset("features", data=arrays["features"], **chunks)
            for name, values in attrs.items():
                file[name].attrs.update(values)
    return folder


def stamp(root, content, *, unit="um", mpp0=0.25, **more):
    for slide, (features, coords) in content.items():
        attrs = {"stamp_version": "2.4.0", "extractor": "uni", "tile_size_um": 256.0, "tile_size_px": 224}
        attrs |= {"unit": unit, "feat_type": "tile", "code_hash": "0", **more}
        arrays = {"feats": features.astype(np.float16), "coords": (coords * mpp0).astype(np.float32)}
        h5(root / f"{slide}.h5", arrays, {"": attrs})
    return root


def slideflow(root, content):
    for slide, (features, coords) in content.items():
        tensor_pt(root / f"{slide}.pt", features)
        np.savez(root / f"{slide}.index.npz", coords)
    config = {"extractor": {"class": "slideflow.model.extractors.Uni"}, "tile_px": 256, "tile_um": 128}
    (root / "bags_config.json").write_text(json.dumps(config))
    return root
