"""Small image pairs on disk, of every kind a source may hold, for the tests of the pair pipeline."""

import io

import numpy as np
from PIL import Image

from data_pipelines.pairs.plan import Options, make_plan
from data_pipelines.pairs.write import run_import

GRADES = ("0", "1+", "2+", "3+")


def noise(seed, size=(16, 16)):
    """[H, W, 3] uint8."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def encoded(pixels, kind="PNG", mode=None, **options):
    """The bytes of an image file."""
    image = Image.fromarray(pixels)
    out = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(out, format=kind, **options)
    return out.getvalue()


def write(path, content):
    """A file of bytes, or of pixels as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else encoded(content))
    return path


def bci(root, train=8, test=4, size=(16, 16)):
    """ROOT/{train,test}/{HE,IHC}/NNNNN_part_grade.png; returns id -> (H&E, IHC)."""
    found = {}
    for part, count in (("train", train), ("test", test)):
        for number in range(count):
            name = f"{number:05d}_{part}_{GRADES[number % 4]}"
            sides = noise([number, part == "train"], size), noise([number, 2 + (part == "train")], size)
            for stain, pixels in zip(("HE", "IHC"), sides):
                write(root / part / stain / f"{name}.png", pixels)
            found[name] = sides
    return found


def imported(source, out, workers=1, **options):
    """The outcome of an import."""
    return run_import(make_plan(source, "toy", Options(**options)), out, workers=workers)
