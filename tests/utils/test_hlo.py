"""Bytes of collectives read from the text of compiled programs, small enough to count by hand."""

import jax
import jax.numpy as jnp
import pytest

from histokd_jax.utils import hlo

REPLICATED = jax.P()


def compiled(fn, *args, out=REPLICATED):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(fn, in_specs=jax.P("x"), out_specs=out, check_vma=False)
        return jax.jit(mapped).lower(*args).compile().as_text()


X = jax.ShapeDtypeStruct((4, 6), jnp.float32)


def test_nothing_is_sent_by_a_local_program():
    assert hlo.collective_bytes(compiled(lambda x: x * 2, X, out=jax.P("x"))) == {}


@pytest.mark.parametrize(
    ("fn", "out", "want"),
    [
        (lambda x: jax.lax.psum(x, "x"), jax.P(), {"all-reduce": 6 * 4}),
        (lambda x: jax.lax.all_gather(x, "x"), jax.P(), {"all-gather": 4 * 6 * 4}),
        (lambda x: jax.lax.ppermute(x, "x", [(0, 1), (1, 0)]), jax.P("x"), {"collective-permute": 6 * 4}),
        (
            lambda x: jax.lax.psum_scatter(jnp.tile(x, (4, 1)) * x.sum(), "x", tiled=True),
            jax.P("x"),
            {"reduce-scatter": 4 * 6 * 4},
        ),
    ],
    ids=["all-reduce", "all-gather", "collective-permute", "reduce-scatter"],
)
def test_one_operation_counts_its_payload(fn, out, want):
    assert hlo.collective_bytes(compiled(fn, X, out=out)) == want


def test_a_loop_counts_every_round():
    def rounds(x):
        return jax.lax.fori_loop(0, 10, lambda i, c: jnp.tanh(jax.lax.psum(c, "x")), x)

    assert hlo.collective_bytes(compiled(rounds, X, out=jax.P("x"))) == {"all-reduce": 10 * 6 * 4}


def test_a_loop_of_unknown_length_is_refused():
    def rounds(x):
        return jax.lax.while_loop(lambda c: c.sum() < 5, lambda c: jax.lax.psum(c, "x"), x)

    with pytest.raises(ValueError, match="number of rounds is not known"):
        hlo.collective_bytes(compiled(rounds, X, out=jax.P("x")))


def test_gathered_rows_are_found():
    """What the pool must never do: a loop over chunks of a sharded axis outside `shard_map`."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        where = jax.sharding.NamedSharding(mesh, jax.P("x"))

        def chunks(x):
            return jax.lax.scan(lambda c, part: (c + jnp.sin(part).sum(0), None), jnp.zeros(8), x.reshape(16, 4, 8))[0]

        text = jax.jit(chunks, in_shardings=where).lower(jax.ShapeDtypeStruct((64, 8), jnp.float32)).compile().as_text()
    assert hlo.collective_total(text) >= 8 * 4


STARTED = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (p: f32[8], q: bf16[2,2]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %q = bf16[2,2]{1,0} parameter(1)
  %gather = (bf16[2,2]{1,0}, bf16[8,2]{1,0}) all-gather-start(%q), dimensions={0}
  %gathered = bf16[8,2]{1,0} all-gather-done(%gather)
  %reduce = f32[8]{0} all-reduce-start(f32[8]{0} %p), to_apply=%add
  ROOT %done = f32[8]{0} all-reduce-done(%reduce)
}
"""


def test_started_operations_count_once():
    assert hlo.collective_bytes(STARTED) == {"all-gather": 8 * 2 * 2, "all-reduce": 8 * 4}


def test_sizes_of_shapes():
    assert hlo.shape_bytes("(f32[2,3]{1,0}, bf16[4], pred[], s4[3])") == 24 + 8 + 1 + 2
    with pytest.raises(ValueError, match="'weird'"):
        hlo.shape_bytes("weird[2]")


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.collective_bytes("not a program")
