"""The networks, losses and gradients of MKD and GMKDN against the golden numbers of the public reference."""

import contextlib
import zlib

import flax.traverse_util
import golden_fill as gf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax import losses
from histokd_jax.losses import cross_entropy
from histokd_jax.methods.mkd import torch_keys
from histokd_jax.methods.mkd.networks import NetworkSpec, build
from histokd_jax.methods.mkd.objective import ObjectiveSpec, loss_terms, objective
from histokd_jax.nn.gated_attention import Bags
from histokd_jax.nn.genes import TokenEncoder

DEAD_GMKDN = ("coattn_", "transformer.", "multi_fc.", "attention.")
GROUP = {"s_p": "S_P", "t_m": "T_M", "t_g": "T_G"}
PRECISIONS = (gf.FLOAT64, gf.FLOAT32)


def precision_context(precision):
    return jax.enable_x64(True) if precision == gf.FLOAT64 else contextlib.nullcontext()


def cast(tree, precision):
    return jax.tree.map(lambda x: jnp.asarray(x, precision), tree)


def one_bag(patches):
    n = patches.shape[0]
    ids = jnp.ones((1, n), jnp.int32)
    return Bags(patches[None], ids, jnp.arange(n, dtype=jnp.int32)[None], num_slots=1)


def is_token_encoder(module, _):
    return isinstance(module, TokenEncoder)


def named_intermediates(sown, network, variant):
    """Sown values under the names of the golden files."""
    names = {
        "weights": "attention_genes" if network == "T_M" else "attention",
        "pooled": "genomic_vector" if variant == "gmkdn" else "pooled_genes",
        "pooled_mrna": "pooled_mrna",
        "pooled_cnv": "pooled_cnv",
        "pooled_path": "pooled_path",
    }
    flat = flax.traverse_util.flatten_dict(sown)
    tokens = dict(("tokens", v[0]) for k, v in flat.items() if k[-2:] == ("tokens", "__call__"))
    return tokens | {names[k[-1]]: v[0] for k, v in flat.items() if k[-1] in names}


def run_single(folder, name, case_name, precision, fusion, extra_shapes, drop):
    """(golden case, scalar, outputs by golden name, parameter gradients by checkpoint key, input gradients)."""
    case = gf.load(folder, name, case_name)
    variant, network = ("gmkdn" if name.startswith("gmkdn") else "mkd"), GROUP[name.split("_", 1)[1]]
    rows = gf.state_dict(folder, name, extra_shapes, drop)
    params = cast(torch_keys.from_torch(rows, network, variant, fusion), precision)
    arrays = cast({k: gf.inputs(k, tuple(shape)) for k, shape in case["inputs"].items()}, precision)
    net = build(NetworkSpec(variant=variant, fusion=fusion))[network]

    def scalar(params, arrays):
        bags = one_bag(arrays["x_path"]) if "x_path" in arrays else None
        streams = {"genes": arrays.get("genes2048", arrays.get("mrna2048")), "cnv": arrays.get("cnv2048")}
        capture = dict(mutable=["intermediates"], capture_intermediates=is_token_encoder)
        (embedding, logits), extra = net.apply({"params": params}, bags, streams, **capture)
        outputs = {"logits": logits, "prob": jax.nn.softmax(logits), "embedding": embedding}
        outputs |= named_intermediates(extra.get("intermediates", {}), network, variant)
        return cross_entropy(logits, jnp.array([1]))[0], outputs

    step = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))
    (value, outputs), (g_params, g_inputs) = step(params, arrays)
    if "x_path" in arrays:
        attention = net.apply({"params": params}, one_bag(arrays["x_path"]), method="attention_map")
        outputs["attention" if network == "S_P" else "attention_path"] = attention
    gradients = torch_keys.to_torch(g_params, network, variant, fusion)
    return case, value, outputs, {f"{name}:{k}": g for k, g in gradients.items()}, g_inputs


CONCAT_SHAPES = {"mm.0.weight": (512, 512), "mm.0.bias": (512,), "mm.2.weight": (256, 512), "mm.2.bias": (256,)}
CASES = [
    ("mkd_s_p", "default", "bilinear", {}, ()),
    ("mkd_t_m", "default", "bilinear", {}, ()),
    ("mkd_t_m", "fusion_concat", "concat", CONCAT_SHAPES, ("mm.linear_", "mm.encoder")),
    ("mkd_t_g", "default", "bilinear", {}, ()),
    ("gmkdn_t_m", "default", "bilinear", {}, DEAD_GMKDN),
    ("gmkdn_t_g", "default", "bilinear", {}, ()),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name,case_name,fusion,extra_shapes,drop", CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_golden_network(golden_dir, name, case_name, fusion, extra_shapes, drop, precision):
    with precision_context(precision):
        case, value, outputs, gradients, g_inputs = run_single(
            golden_dir, name, case_name, precision, fusion, extra_shapes, drop
        )
        for key, golden in case["outputs"].items():
            # Maps over patches are float32 by contract, in either precision.
            is_map = key == "attention_path" or (name, key) == ("mkd_s_p", "attention")
            gf.assert_output(golden, outputs[key], gf.FLOAT32 if is_map else precision, key)
        rtol = 1e-10 if precision == gf.FLOAT64 else 1e-5
        np.testing.assert_allclose(float(value), case["scalar"]["float64"], rtol=rtol)
        gf.assert_gradients(case, gradients, precision)
        gf.assert_input_gradients(case, g_inputs, precision)


SIZES, LABELS, ROW = (23, 17, 9, 31), (0, 1, 1, 0), 48


def packed_batch(arrays, precision):
    """Four bags as two rows of 48 patches, so that one slide spans rows and the tail is padding."""
    x = jnp.concatenate([arrays[f"mkd/x_path/{i}"] for i in range(4)])
    pad = 2 * ROW - x.shape[0]
    x = jnp.concatenate([x, jnp.full((pad, x.shape[1]), jnp.nan, x.dtype)]).reshape(2, ROW, -1)
    ids = np.concatenate([np.repeat(np.arange(1, 5), SIZES), np.zeros(pad)]).astype(np.int32).reshape(2, ROW)
    positions = np.concatenate([*(np.arange(n) for n in SIZES), np.zeros(pad)]).astype(np.int32).reshape(2, ROW)
    genes = jnp.concatenate([arrays[f"mkd/genes/{i}"] for i in range(4)])
    batch = {"weight": jnp.ones(4, jnp.float32), "label": jnp.array(LABELS)}
    return Bags(x, jnp.asarray(ids), jnp.asarray(positions), 4), {"genes": genes}, batch


def golden_terms(outputs, batch):
    """Every term of the golden file, each computed by the library with only that term switched on."""
    p, m, g = outputs["P"], outputs["M"], outputs["G"]
    z = {n: outputs[f"z_{n}"] for n in "PMG"}
    ours = {f"H_{n}": outputs[n] for n in "PMG"} | {f"z_{n}": z[n] for n in "PMG"}
    ours |= {"SP_PM": losses.sp_loss(p, m), "SP_PG": losses.sp_loss(p, g)}
    ours |= {f"KL_{a}_from_{b}": losses.mutual_kl(z[a], z[b]) for a, b in ("PM", "MP", "PG", "GP")}
    ours |= {
        "CORAL_MP": losses.coral_loss(m, p),
        "CORAL_GP": losses.coral_loss(g, p),
        "CORAL_GM": losses.coral_loss(g, m),
    }
    pairs = {"inner_MP": (m, p), "inner_GP": (g, p), "inner_GM": (g, m)}
    ours |= {k: jnp.mean(jnp.sum(a * b, axis=-1)) for k, (a, b) in pairs.items()}
    terms = loss_terms(ObjectiveSpec(), outputs, batch)
    ours |= {f"L_{k.upper()}": terms[k] for k in ("skd", "clod", "or", "coral")}
    ours |= {k: terms[k] for k in ("ce_p", "ce_m", "ce_g")}
    ours["L_CE"] = terms["ce_p"] + terms["ce_m"] + terms["ce_g"]
    ours["L_total"] = objective(ObjectiveSpec(), outputs, batch)[0]
    return ours


@pytest.mark.parametrize("precision", PRECISIONS)
def test_golden_mkd_batch(golden_dir, precision):
    case = gf.load(golden_dir, "mkd_batch")
    nets = build(NetworkSpec(chunk=32))
    prefix = {"S_P": "mkd_s_p", "T_M": "mkd_t_m", "T_G": "mkd_t_g"}
    with precision_context(precision):
        params = {n: torch_keys.from_torch(gf.state_dict(golden_dir, prefix[n]), n) for n in nets}
        params = cast(params, precision)
        arrays = cast({k: gf.inputs(k, tuple(shape)) for k, shape in case["inputs"].items()}, precision)

        def total(params, arrays):
            bags, streams, batch = packed_batch(arrays, precision)
            outputs = {}
            for n, net in nets.items():
                outputs[n[-1]], outputs[f"z_{n[-1]}"] = net.apply({"params": params[n]}, bags, streams)
            return objective(ObjectiveSpec(), outputs, batch)[0], (outputs, batch)

        (value, (outputs, batch)), grads = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, arrays)
        ours = jax.jit(golden_terms)(outputs, batch)
        assert set(ours) == set(case["outputs"])
        for key, golden in case["outputs"].items():
            gf.assert_output(golden, ours[key], precision, key)
        np.testing.assert_allclose(
            float(value), case["scalar"]["float64"], rtol=1e-10 if precision == gf.FLOAT64 else 1e-5
        )
        gradients = {f"{prefix[n]}:{k}": g for n in nets for k, g in torch_keys.to_torch(grads[0][n], n).items()}
        gf.assert_gradients(case, gradients, precision)
        gf.assert_input_gradients(case, grads[1], precision)


@pytest.mark.parametrize("name", ["mkd_s_p", "mkd_t_m", "mkd_t_g", "gmkdn_t_m", "gmkdn_t_g"])
def test_golden_fill_matches_the_key_table(golden_dir, name):
    for row in gf.key_table(golden_dir, name):
        if row["used_in_forward"] == "no":
            continue
        value = gf.fill(row["key"], row["shape"])
        assert zlib.crc32(row["key"].encode()) == int(row["stream"])
        np.testing.assert_allclose(
            [value.flat[0], value.sum()], [float(row["first_value"]), float(row["sum"])], rtol=1e-9, atol=1e-9
        )


def test_golden_fill_rule_self_test():
    np.testing.assert_allclose(gf.noise("probe", (3,)), [-1.456130723172, 1.721368725705, -1.418873344272], atol=1e-12)
    x = gf.inputs("x_path", (23, 1024))
    np.testing.assert_allclose([x[-1, -1], x.sum()], [1.061605597120, 177.702294516], atol=1e-8)


@pytest.mark.parametrize("name", ["mkd_s_p", "mkd_t_m", "mkd_t_g", "gmkdn_t_m", "gmkdn_t_g"])
def test_torch_keys_round_trip(golden_dir, name):
    variant, network = name.split("_", 1)[0], GROUP[name.split("_", 1)[1]]
    state = gf.state_dict(golden_dir, name, drop=("transformer.",))
    used = {r["key"].split(":")[1] for r in gf.key_table(golden_dir, name) if r["used_in_forward"] == "yes"}
    back = torch_keys.to_torch(torch_keys.from_torch(state, network, variant), network, variant)
    assert set(back) == used
    for key in used:
        np.testing.assert_array_equal(back[key], state[key])


def test_torch_keys_reject_a_foreign_checkpoint(golden_dir):
    state = gf.state_dict(golden_dir, "mkd_s_p")
    with pytest.raises(ValueError, match="missing keys"):
        torch_keys.from_torch(state, "T_G")
