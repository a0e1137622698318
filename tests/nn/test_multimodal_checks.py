"""Sizes, fusion, co-attention, padding rule and start of MCAT, PORPOISE MMF and SurvPath: checks B1, B5, B9, B10."""

import csv
import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import survival_golden as sg
from multimodal_setup import FEAT, GROUPS, NETS, OFF, assert_same, bags, genes, parameters, run

from histokd_jax.nn.grouped_snn import GroupedSelfNormalising, check_groups, gene_blocks
from histokd_jax.nn.mcat import Mcat
from histokd_jax.nn.mil.readout import LateBilinear
from histokd_jax.nn.porpoise import PorpoiseMmf
from histokd_jax.nn.post_norm import PostNormEncoder
from histokd_jax.nn.survpath import SurvPath


@pytest.mark.parametrize("name", ["mcat_concat", "survpath"])
def test_bfloat16_stays_close(name):
    net = NETS[name]
    params = parameters(net)
    exact = run(net, params, sg.pack(bags()), genes(4))
    half = run(net.clone(dtype=jnp.bfloat16), params, sg.pack(bags()), genes(4))
    assert half["logits"].dtype == jnp.float32
    error = np.abs(half["logits"] - exact["logits"]).max()
    assert 0 < error < 0.1 * np.abs(exact["logits"]).max() + 0.1


def count(net, feat, genes_total):
    packed, molecular = sg.pack([np.zeros((3, feat), np.float32)]), {"genes": jnp.zeros((1, genes_total))}
    shapes = jax.eval_shape(lambda key: net.init(key, packed, molecular), jax.random.key(0))["params"]
    return sg.count(shapes)


BLCA, UCEC = (94, 334, 521, 468, 1495, 479), (3, 24, 21, 22, 64, 15)


@pytest.mark.parametrize(
    "groups,fusion,expected",
    [(BLCA, "concat", 4_491_782), (BLCA, "bilinear", 4_690_886), (UCEC, "concat", 3_661_830)],
)
def test_B1_parameters_of_mcat(groups, fusion, expected):
    assert count(Mcat(1024, 4, groups, fusion=fusion), 1024, sum(groups)) == expected


def test_B1_parameters_of_porpoise_mmf():
    assert count(PorpoiseMmf(1024, 4, 2181), 1024, 2181) == 2_071_749


@pytest.mark.real_data
def test_B1_parameters_of_survpath_with_the_published_pathways(real_data):
    path = real_data / "tcga_genomics/survpath/datasets_csv/pathway_compositions/combine_comps.csv.gz"
    with gzip.open(path, "rt", newline="") as f:
        rows = list(csv.reader(f))[1:]
    sizes = tuple(int(sum(float(cell) for cell in column)) for column in zip(*(row[1:] for row in rows)))
    assert len(sizes) == 331
    assert count(SurvPath(1024, 4, sizes), 1024, sum(sizes)) == 24_768_068


@pytest.mark.parametrize("name", ["mcat_bilinear", "porpoise", "porpoise_plain"])
def test_B5_outer_product_ends_in_one_and_gates_read_image_then_omics(name):
    net = NETS[name]
    params = parameters(net)
    width = net.width
    image, omic = np.random.default_rng(0).normal(size=(2, 3, width)).astype(np.float32)
    gates = OFF if name == "porpoise_plain" else (True, True)
    skip = name == "porpoise"
    block = LateBilinear(width, width, width, gates=gates, skip=skip)
    outer = block.apply({"params": params["fuse"]}, image, omic, method="outer")
    assert outer.shape == (3, (width // 8 + 1) ** 2)
    np.testing.assert_array_equal(outer[:, -1], 1.0)
    t = jax.tree.map(np.asarray, params["fuse"])

    def layer(key, x):
        return x @ t[key]["kernel"] + t[key]["bias"]

    def factor(i, own):
        gate = 1 / (1 + np.exp(-layer(f"z{i}", np.concatenate([image, omic], 1)))) if gates[0] else 1.0
        return np.maximum(layer(f"o{i}", gate * np.maximum(layer(f"h{i}", own), 0)), 0)

    pair = [np.concatenate([factor(i, own), np.ones((3, 1))], 1) for i, own in ((1, image), (2, omic))]
    np.testing.assert_allclose(outer, np.einsum("si,sj->sij", *pair).reshape(3, -1), atol=1e-5)
    assert params["fuse"]["merge"]["kernel"].shape == (3 * width if skip else width, width)


def test_B5_full_size_outer_product():
    block = LateBilinear(256, 256, 256)
    zeros = jnp.zeros((1, 256))
    assert jax.eval_shape(lambda k: block.init(k, zeros, zeros), jax.random.key(0))["params"]["encode"][
        "kernel"
    ].shape == (1089, 256)


def test_B9_copies_of_one_patch_give_equal_coattended_rows():
    net = NETS["mcat_concat"]
    params = parameters(net)
    packed = sg.pack([np.repeat(bags()[0][:1], 7, axis=0)])
    out = run(net, params, packed, genes(1))
    rows = np.asarray(out["coattended"][0])
    np.testing.assert_allclose(rows, np.repeat(rows[:1], len(GROUPS), axis=0), atol=1e-6)
    assert np.abs(rows).max() > 1e-2
    assert np.abs(np.diff(out["group_tokens"][0], axis=0)).max() > 1e-2


def test_B9_returned_scores_are_before_the_softmax():
    net = NETS["mcat_concat"]
    params = parameters(net)
    packed, molecular = sg.pack(bags()), genes(4)
    scores = np.asarray(run(net, params, packed, molecular, method="coattention_scores"))
    weights = np.asarray(run(net, params, packed, molecular, method="attention_map"))
    t = jax.tree.map(np.asarray, params["coattention"])
    tokens = np.asarray(run(net, params, packed, molecular)["group_tokens"])
    for slot, x in enumerate(bags()):
        h = np.maximum(x @ t["proj"]["kernel"] + t["proj"]["bias"], 0)
        q = tokens[slot] @ t["qkv"]["kernel"][:, :16] + t["qkv"]["bias"][:16]
        k = h @ t["qkv"]["kernel"][:, 16:32] + t["qkv"]["bias"][16:32]
        own = np.asarray(packed.segment_ids) == slot + 1
        np.testing.assert_allclose(scores[:, own], q @ k.T / 4, rtol=1e-4, atol=1e-4)
        e = np.exp(scores[:, own])
        np.testing.assert_allclose(weights[own], (e / e.sum(-1, keepdims=True)).mean(0), atol=1e-5)


def test_B10_a_patch_reaches_pathways_but_no_other_patch():
    net = NETS["survpath"]
    params = parameters(net)
    x, molecular = bags()[2], genes(1)
    moved = x.copy()
    moved[4] += 1.0
    packed = sg.pack([x], row=20)

    @jax.jit
    def both(patches):
        inputs = packed._replace(patches=patches), molecular
        patch = net.apply({"params": params}, *inputs, method="patch_rows").attended.T
        return patch, net.apply({"params": params}, *inputs, mutable=["intermediates"])[1]

    def rows(x):
        patch, sown = both(sg.pack([x], row=20).patches)
        return np.asarray(patch)[: len(x)], np.asarray(sown["intermediates"]["pathway_rows"][0]["attended"][0])

    (patch, pathway), (patch2, pathway2) = rows(x), rows(moved)
    others = np.arange(len(x)) != 4
    np.testing.assert_array_equal(patch[others], patch2[others])
    assert np.abs(patch - patch2)[4].max() > 1e-3
    assert np.abs(pathway - pathway2).max(axis=1).min() > 1e-4


def test_B10_faithful_padding_takes_part_and_corrected_does_not():
    corrected = NETS["survpath"]
    faithful = corrected.clone(pad_to=12)
    params, molecular, seed = parameters(corrected), genes(4), jnp.uint32(2)
    # Zero rows as patches, which is what the authors' code does to bags below the bag size.
    filled = [np.concatenate([b, np.zeros((max(12 - len(b), 0), FEAT), np.float32)]) for b in bags()]
    expected = run(corrected, params, sg.pack(filled), molecular, seed)
    actual = run(faithful, params, sg.pack(bags()), molecular, seed)
    assert_same(actual, expected)
    plain = run(corrected, params, sg.pack(bags()), molecular, seed)
    assert np.abs(plain["logits"] - actual["logits"])[[0, 1, 3]].max(axis=1).min() > 1e-4
    np.testing.assert_allclose(plain["logits"][2], actual["logits"][2], atol=1e-5)
    # Deployment knows no padding.
    quiet = (run(net, params, sg.pack(bags()), molecular) for net in (faithful, corrected))
    assert_same(*quiet, atol=0)


def test_encoder_layers_start_equal_and_apart_in_memory():
    net = PostNormEncoder(64)
    params = jax.jit(lambda k: net.init(k, jnp.zeros((1, 2, 64))))(jax.random.key(0))["params"]
    first, second = params["layers_0"], params["layers_1"]
    jax.tree.map(np.testing.assert_array_equal, first, second)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)]
    assert len(set(pointers)) == len(pointers)
    bound = (6 / 256) ** 0.5
    assert 0.97 * bound < np.abs(first["qkv"]["kernel"]).max() <= bound
    for key in ("qkv", "out"):
        np.testing.assert_array_equal(first[key]["bias"], 0.0)
    assert 0.9 / 8 < np.abs(first["fc1"]["bias"]).max() <= 1 / 8


def test_grouped_blocks_equal_one_network_per_group():
    net = GroupedSelfNormalising(GROUPS, 8)
    molecular = genes(3)["genes"]
    params = jax.jit(lambda k: net.init(k, molecular))(jax.random.key(0))["params"]
    out = np.asarray(net.apply({"params": params}, molecular))
    t = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    start = 0
    for i, size in enumerate(GROUPS):
        kernel = t["kernel1"][start : start + size]
        assert np.abs(kernel).max() <= size**-0.5 and np.abs(t["bias1"][i]).max() <= size**-0.5
        h = molecular[:, start : start + size] @ kernel + t["bias1"][i]
        h = np.where(h > 0, h, np.expm1(h)) @ t["kernel2"][i] + t["bias2"][i]
        np.testing.assert_allclose(out[:, i], np.where(h > 0, h, np.expm1(h)), atol=1e-5)
        start += size


def test_gene_blocks_cover_every_gene_once():
    index, owner = gene_blocks((3, 1, 20, 2), 8)
    assert owner.tolist() == [0, 1, 2, 2, 2, 3]
    assert sorted(index[index < 26].tolist()) == list(range(26))


@pytest.mark.parametrize("sizes,total", [((), 3), ((2, 0, 1), 3), ((2, 2), 3)])
def test_wrong_groups_are_named(sizes, total):
    with pytest.raises(ValueError, match="do not describe 3 genes"):
        check_groups(sizes, total)
