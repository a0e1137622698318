"""Small labelled patches and tiny encoders for the tests of probes."""

import numpy as np
from pair_files import write

from data_pipelines.labelled.patches import LabelledPatches, digest_of
from histokd_jax.encoders import loading
from histokd_jax.encoders.presets import Encoder, Transform, vit
from histokd_jax.nn.encoders.specs import ResNetSpec

EDGE = 32
PLAIN = Transform(size=EDGE, resize=EDGE)
RESNET = Encoder("tiny_resnet", ResNetSpec((1, 1), width=4, image=EDGE), PLAIN)
VIT = Encoder("tiny_vit", vit(16, 8, 2, 2, image=EDGE), PLAIN)


def resnet(seed=0):
    return loading.random(RESNET, seed)


def picture(c, seed, edge=EDGE):
    """[e, e, 3] uint8 noise, the lighter the higher the class."""
    noise = np.random.default_rng([seed, c]).integers(0, 90, (edge, edge, 3))
    return (noise + 60 * c).astype(np.uint8)


def pictures(per_class=6, classes=2, edge=EDGE):
    """([n, e, e, 3] uint8, [n] int32), classes in turn."""
    label = np.tile(np.arange(classes, dtype=np.int32), per_class)
    return np.stack([picture(int(c), i, edge) for i, c in enumerate(label)]), label


def patches_of(images=None, label=None, arrays=None, **changes):
    """A set in memory."""
    label = np.asarray(label, np.int32)
    n = len(label)
    fields = {
        "name": "toy",
        "ids": tuple(f"p{i:02d}" for i in range(n)),
        "label": label,
        "class_names": tuple(f"class {c}" for c in range(int(label.max()) + 1)),
        "group": ("",) * n,
        "part": ("",) * n,
        "digest": tuple(digest_of(str(i).encode()) for i in range(n)),
        "arrays": arrays or {},
        "read": None if images is None else images.__getitem__,
    }
    return LabelledPatches(**{**fields, **changes})


def write_folder(root, per_class=6, classes=("benign", "malignant"), groups=True, edge=EDGE, **columns):
    """ROOT/CLASS/NN.png and labels.csv; three images of a class per group."""
    lines = ["file,label,group"]
    for i in range(per_class * len(classes)):
        c, number = i % len(classes), i // len(classes)
        file = f"{classes[c]}/{number:02d}.png"
        write(root / file, picture(c, i, edge))
        lines.append(f"{file},{columns.get(file, classes[c])},{f'slide_{c}_{number // 3}' if groups else ''}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


def blobs(n=60, width=6, classes=3, seed=0, spread=1.2):
    """([n, D] float32, [n] int32) overlapping Gaussian clouds."""
    rng = np.random.default_rng(seed)
    label = np.arange(n, dtype=np.int32) % classes
    centres = rng.normal(size=(classes, width))
    return (centres[label] + spread * rng.normal(size=(n, width))).astype(np.float32), label
