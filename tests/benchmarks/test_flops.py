"""Analytic FLOPs against XLA's own count where that is exact, parameters against the library, peaks by exact name."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import bench_step, flops, peaks  # noqa: E402
from histokd_jax.train import step  # noqa: E402

CONFIG = {
    **bench_step.SMOKE,
    **{"feat_dim": 128, "model_d": 64, "model_attn": 32, "genes": 256, "token_size": 64},
}
PATCHES, SLIDES = 2048, 2


@functools.cache
def counted(name):
    """XLA's FLOPs of one gradient on one chunk that holds the whole step: no loop body is counted once too few."""
    method = bench_step.build_method(name, "float32", {**CONFIG, "chunk": PATCHES})
    params, _ = jax.eval_shape(method.init, jax.random.key(0))
    row = jax.ShapeDtypeStruct((1, PATCHES), jnp.int32)
    batch = {
        "patches": jax.ShapeDtypeStruct((1, PATCHES, CONFIG["feat_dim"]), jnp.float32),
        "segment_ids": row,
        "positions": row,
        "weight": jax.ShapeDtypeStruct((SLIDES,), jnp.float32),
        "label": jax.ShapeDtypeStruct((SLIDES,), jnp.int32),
        "genes": jax.ShapeDtypeStruct((SLIDES, CONFIG["genes"]), jnp.float32),
    }

    def gradient(params, batch, key):
        return step.loss_and_gradients(method, "online", params, {}, batch, key, jnp.zeros((), jnp.int32))[3]

    lowered = jax.jit(gradient).lower(params, batch, jax.eval_shape(jax.random.key, 0))
    return lowered.compile().cost_analysis()["flops"]


@pytest.mark.parametrize("method", flops.METHODS)
def test_step_flops_match_the_compiled_program(method):
    expected = flops.step_flops(flops.Widths.of(CONFIG), method, PATCHES, SLIDES)
    # XLA also counts elementwise work and the one-hot form of the weighted sum: a little more, never less.
    assert expected <= counted(method) <= 1.15 * expected


def test_parts_of_a_slide_match_the_compiled_program():
    w = flops.Widths.of(CONFIG)
    found = counted("mkd") - 2 * counted("student")
    expected = SLIDES * (flops.slide_flops(w, "mkd") - 2 * flops.slide_flops(w, "student"))
    # A difference of large counts: bounds the gene and fusion terms within a quarter.
    assert 0.75 * expected < found < 1.25 * expected + 0.1 * flops.step_flops(w, "student", PATCHES, 0)


@pytest.mark.parametrize("method", flops.METHODS)
def test_parameters_match_the_library(method):
    params, _ = jax.eval_shape(bench_step.build_method(method, "float32", CONFIG).init, jax.random.key(0))
    total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    assert flops.parameters(flops.Widths.of(CONFIG), method) == total


def test_widths_of_the_published_model_give_the_known_cost_per_patch():
    # Forward 2 D H + 4 H A; backward once for the first layer, twice for the rest (and small terms for the pooling).
    w = flops.Widths(1024, 512, 256)
    assert flops.patch_flops(w, "student") == pytest.approx(3.67e6, rel=0.01)
    assert flops.patch_flops(w, "mkd") == 2 * flops.patch_flops(w, "student")


def test_least_bytes_are_two_reads_of_the_patches_and_the_optimizer():
    w = flops.Widths(genes=0, token_size=1)
    base = flops.step_bytes(w, "student", 0, 0, 2)
    assert base == 24 * flops.parameters(w, "student")
    assert flops.step_bytes(w, "student", 10, 3, 2) - base == 10 * 2 * 1024 * 2
    assert flops.step_bytes(w, "student", 10, 3, 4) - base == 10 * 2 * 1024 * 4


def test_unknown_methods_and_devices_are_refused_by_name():
    with pytest.raises(ValueError, match="method 'other' has no analytic count"):
        flops.patch_flops(flops.Widths(), "other")
    for kind in ("NVIDIA H300", "H200", "cpu"):
        with pytest.raises(peaks.UnknownDeviceError, match=f"device '{kind}' has no entry"):
            peaks.lookup(kind)


def test_peaks_are_plausible_and_follow_the_compute_dtype():
    h200 = peaks.lookup("NVIDIA H200")
    assert (h200.product_tflops("bfloat16"), h200.product_tflops("float32"), h200.hbm_gb_s) == (989.4, 494.7, 4800)
    assert peaks.lookup("TPU v5 lite").product_tflops("float32") == 197
    for peak in peaks.PEAKS.values():
        assert 50 < peak.bf16_tflops < 5000 and 100 < peak.hbm_gb_s < 10_000 and peak.link_domain >= 8
        ridge = peak.bf16_tflops * 1e3 / peak.hbm_gb_s  # FLOP per byte: dense rates of all these lie in this range
        assert 100 < ridge < 700
    with pytest.raises(ValueError, match="no peak for products of 'int8'"):
        h200.product_tflops("int8")
