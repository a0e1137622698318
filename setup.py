"""Packaging of histokd_jax.

`configs/` is shipped as package data of `histokd_jax.configs`, so that `--config configs/mkd.py` also resolves from an
installed wheel; `benchmarks` and `tests` are not installed (their names would clash in site-packages).
"""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "histokd_jax" / "__init__.py").read_text()).group(1)

CORE = [
    "jax>=0.10",
    "flax>=0.12",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "grain>=0.2.16",
    "numpy>=2.0",
    "openslide-python>=1.4",
    "tensorflow-datasets>=4.9.10",
    "ml-collections>=1.1",
    "clu>=0.0.12",
    "array_record>=0.8.3",
    # tensorflow-datasets imports it but declares it only for old Pythons.
    "importlib_resources",
    "absl-py>=2.1",
    "pandas>=2.2",
    "scipy>=1.13",
    "scikit-learn>=1.5",
    # TensorBoard event files without TensorFlow.
    "tensorboardX>=2.6",
    "tqdm>=4.66",
]
EXTRAS = {
    "report": ["matplotlib>=3.9"],
    "wsi": ["openslide-bin>=4.0", "pillow>=10.0", "scikit-image>=0.24"],
    # Feature files of other tools (HDF5), and encoder weights (safetensors).
    "import": ["h5py>=3.11", "safetensors>=0.4"],
    "torch": ["torch>=2.6"],
    # Cluster analysis of embeddings (`histokd probe --clusters`); HDBSCAN is scikit-learn's.
    "clusters": ["umap-learn>=0.5.7"],
    # Limits protobuf, pyarrow and numpy of the whole environment; `make test-beam` therefore uses one of its own.
    "beam": ["apache-beam>=2.77"],
    "cuda": ["jax[cuda12]>=0.10"],
    "tpu": ["jax[tpu]>=0.10"],
}
EXTRAS["test"] = [
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "lifelines>=0.30",
    "scikit-survival>=0.24",
    "setuptools>=75",
    "wheel",
    "ruff>=0.8",
    *EXTRAS["report"],
    *EXTRAS["wsi"],
    *EXTRAS["import"],
]

setup(
    name="histokd_jax",
    version=VERSION,
    description="Multi-modal knowledge distillation for histopathology: all modalities in training, H&E at test",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["histokd_jax*", "data_pipelines*"]), "histokd_jax.configs"],
    package_dir={"histokd_jax.configs": "configs"},
    package_data={"histokd_jax.configs": ["*.py", "*/*.py"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["histokd = histokd_jax.cli.main:main"]},
)
