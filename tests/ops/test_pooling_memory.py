"""A bag of 1,000,000 x 1,024 patches: memory of the compiled training step, and of an executed smaller one."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

from histokd_jax.ops.pooling import chunked

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import bench_pooling  # noqa: E402

MILLION = bench_pooling.padded(1_000_000, 512)
NET = {"width": 256, "hidden": 128, "queries": 6, "compute": "float32"}


def temporaries(name, dtype, length=MILLION, impl="chunked", feat_dim=1024, **changes):
    """Bytes of temporaries of a training step by the compiled program; nothing is allocated."""
    module, tokens = bench_pooling.network(name, impl, 512, feat_dim, {**NET, **changes})
    init, functions = bench_pooling.make_functions(module, tokens)
    inputs = bench_pooling.shapes(length, feat_dim, dtype)
    compiled = bench_pooling.compile_cell(functions[bench_pooling.TRAIN], init, inputs)
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", bench_pooling.DTYPES)
@pytest.mark.parametrize("name", bench_pooling.NETWORKS)
def test_a_million_patches_train_with_little_memory(name, dtype):
    assert temporaries(name, dtype) < 2**27, "128 MiB; the bound of the specification is 1 GiB"


def test_a_million_patches_train_with_little_memory_in_bfloat16_products():
    assert temporaries("attention", "bfloat16", compute="bfloat16") < 2**27


def test_the_measure_sees_activations():
    """The same step with all activations kept breaks the bound, so the bound can fail."""
    assert temporaries("attention", "float16", impl="segment") > 2**30


def test_products_are_kept_for_short_bags_only():
    module, _ = bench_pooling.network("attention", "chunked", 512, 1024, NET)
    init, _ = bench_pooling.make_functions(module, ())
    params = jax.eval_shape(init, jax.random.key(0))
    columns = {
        "proj": {"kernel_t": params["proj"]["kernel"].update(shape=(256, 1024)), "bias": params["proj"]["bias"]},
        "attention": {
            "gate": {
                "kernel_t": jax.ShapeDtypeStruct((256, 256), jnp.float32),
                "bias": jax.ShapeDtypeStruct((256,), jnp.float32),
            },
            "score": {
                "kernel_t": jax.ShapeDtypeStruct((1, 128), jnp.float32),
                "bias": jax.ShapeDtypeStruct((1,), jnp.float32),
            },
        },
    }
    static = chunked.Static(module.features, 1, 512)

    def kept(length):
        return chunked._kept(static, columns, jax.ShapeDtypeStruct((1, length, 1024), jnp.float16), ())

    assert [kept(n) for n in (2_048, 100_000, MILLION)] == [2, 1, 0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_executed_step_needs_little_beyond_its_input(dtype):
    """The process grows by less than half of its input: a converted or masked copy would double it."""
    settings = {**NET, "width": 16, "hidden": 8, "patches": 2**17, "feat_dim": 1024, "chunk": 512}
    found = bench_pooling.one_step_in_fresh_process({**settings, "dtype": dtype, "network": "attention"})
    assert found["input_bytes"] >= 2**28
    assert found["peak_bytes"] - found["before_bytes"] < found["input_bytes"] // 2
    assert found["peak_bytes"] - found["input_bytes"] < 1.5 * 2**30
