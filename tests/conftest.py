"""Eight simulated CPU devices for every test, strict rank promotion, and the optional folder of real data."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the work of this suite: quick code here, optimised code in `make test-slow`, which sets 0.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests build the same small program: compile each once, also across sessions and child processes.
CACHE = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# Grain's workers read absl flags; outside app.run they would raise UnparsedFlagAccessError.
flags.FLAGS.mark_as_parsed()

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "golden"
# Folders whose files take longest: they compile networks, train, and start processes.
LONG = {"cli", "convert", "methods", "multiprocess", "nn", "train"}


def pytest_collection_modifyitems(items):
    """Long files first, so that the workers of a parallel run (with --no-loadscope-reorder) end at the same time."""
    items.sort(key=lambda item: item.path.relative_to(HERE).parts[0] not in LONG)


@pytest.fixture(scope="session")
def golden_dir():
    """Folder of golden numbers (tests/golden)."""
    return GOLDEN


@pytest.fixture(scope="session")
def real_data():
    """Folder of real data named by HISTOKD_REAL_DATA; tests that need it skip with the reason when it is unset."""
    path = os.environ.get("HISTOKD_REAL_DATA")
    if not path:
        pytest.skip("HISTOKD_REAL_DATA is not set: real data are not part of the repository")
    return pathlib.Path(path)
