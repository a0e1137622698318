"""Sources of image pairs become data sets: adapters, partners, labels, groups, sizes, resuming, TFDS."""

import json
import pathlib

import numpy as np
import pair_files
import pytest

from data_pipelines import planned_writer
from data_pipelines.errors import DataError, DatasetExistsError, ManifestError, ShardReadError
from data_pipelines.importers.plan import NothingUsable
from data_pipelines.manifest import Manifest
from data_pipelines.pairs import codec
from data_pipelines.pairs.labels import LabelRule
from data_pipelines.pairs.manifest import PairManifest
from data_pipelines.pairs.plan import Options, make_plan
from data_pipelines.pairs.reader import PairReader
from data_pipelines.pairs.write import run_import

NO_LABELS = LabelRule("none")


def content(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.is_file()}


def rejected(outcome):
    return {(pathlib.PurePosixPath(item.file).name, item.reason) for item in outcome.rejected}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    return root, pair_files.bci(root)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The imported data set; read only."""
    return pair_files.imported(source[0], tmp_path_factory.mktemp("whole") / "data", workers=2)


def test_every_pixel_label_and_part_arrives(source, whole):
    root, images = source
    manifest, reader = whole.manifest, PairReader(whole.manifest.directory)
    assert [e.example_id for e in manifest.examples] == sorted(images, key=lambda name: ("_test_" in name, name))
    assert manifest.class_names == ("0", "1+", "2+", "3+") and manifest.image_size == (16, 16) and manifest.partner
    for row, example in enumerate(manifest.examples):
        found, (image, partner) = reader.read(row), images[example.example_id]
        np.testing.assert_array_equal(found.image, image)
        np.testing.assert_array_equal(found.partner, partner)
        assert manifest.class_names[example.label] == example.example_id.split("_")[2]
        assert example.split == example.example_id.split("_")[1] and found.vector is None
        name = f"{example.example_id}.png"
        assert reader.read_record(row).image == (root / example.split / "HE" / name).read_bytes(), "kept as it is"
    assert whole.rejected == () and json.loads((manifest.directory / "manifest.json").read_text())["kind"] == "pairs"


def test_tensorflow_datasets_opens_the_same_files(whole, source):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(whole.manifest.directory)
    assert builder.info.splits["train"].num_examples == 8 and builder.info.splits["test"].num_examples == 4
    first = builder.as_data_source("test")[1]
    image, partner = source[1]["00001_test_1+"]
    np.testing.assert_array_equal(first["image"], image)
    np.testing.assert_array_equal(first["partner"], partner)
    assert first["example_id"] == b"00001_test_1+" and (first["label"], first["has_partner"]) == (1, 1)


def test_repeating_resuming_and_threads_give_the_same_bytes(source, whole, tmp_path):
    root, expected = source[0], content(whole.manifest.directory)
    plan = make_plan(root, "toy", Options(), shard_bytes=1)
    many = run_import(plan, tmp_path / "many", workers=3).manifest
    assert len(many.shards) == 12 and many.shards[0].file == "pairs-train.array_record-00000-of-00008"
    again = run_import(make_plan(root, "toy", Options()), whole.manifest.directory)
    assert again.already_complete and again.rejected == ()
    part = tmp_path / "part"
    with planned_writer.work_folder(part) as work:
        from data_pipelines.pairs.write import _entries

        first = make_plan(root, "toy", Options())
        planned_writer.write_entries(work, 0, first.key(0), _entries(first, 0, lambda n: None))
    resumed = pair_files.imported(root, part)
    assert resumed.shards_kept == 1 and content(part) == expected


def test_another_import_does_not_overwrite_unasked(source, whole, tmp_path):
    out = tmp_path / "out"
    pair_files.imported(source[0], out)
    plan = make_plan(source[0], "toy", Options(resize=(8, 8)))
    with pytest.raises(DatasetExistsError, match="--overwrite"):
        run_import(plan, out)
    assert run_import(plan, out, overwrite=True).manifest.image_size == (8, 8)
    facts = json.loads((out / "manifest.json").read_text())
    assert facts["resized"] == {"from": {"16x16": 12}, "to": [8, 8], "filter": "lanczos"}


def test_missing_partners_are_listed_kept_or_refused(tmp_path):
    pair_files.bci(tmp_path / "s", train=4, test=2)
    (tmp_path / "s/train/IHC/00001_train_1+.png").unlink()
    (tmp_path / "s/test/HE/00000_test_0.png").unlink()
    outcome = pair_files.imported(tmp_path / "s", tmp_path / "a")
    assert rejected(outcome) == {
        ("00001_train_1+.png", "missing partner"),
        ("00000_test_0.png", "partner without its H&E image"),
    }
    assert len(outcome.manifest.examples) == 4
    assert "missing partner" in (tmp_path / "a/quarantine.csv").read_text()
    with pytest.raises(DataError, match=r"1 of 5 H&E images have no partner \(first train/HE/00001_train_1\+\.png\)"):
        make_plan(tmp_path / "s", "toy", Options(missing_partner="refuse"))
    kept = pair_files.imported(tmp_path / "s", tmp_path / "b", missing_partner="keep").manifest
    assert [e.has_partner for e in kept.examples] == [1, 0, 1, 1, 1]
    assert PairReader(kept).read(1).partner is None


def test_partners_match_by_stem_and_only_one_may_fit(tmp_path):
    image = pair_files.noise(1)
    pair_files.write(tmp_path / "HE/a_0.png", image)
    pair_files.write(tmp_path / "IHC/a_0.jpg", pair_files.encoded(image, "JPEG"))
    outcome = pair_files.imported(tmp_path, tmp_path / "out", rule=NO_LABELS)
    assert outcome.manifest.examples[0].has_partner and outcome.manifest.class_names == ()
    pair_files.write(tmp_path / "IHC/a_0.bmp", image)
    with pytest.raises(DataError, match=r"a_0\.png has several possible partners: a_0\.bmp, a_0\.jpg"):
        make_plan(tmp_path, "toy", Options(rule=NO_LABELS))


def test_a_set_without_any_partner_folder_says_where_it_looked(tmp_path):
    pair_files.write(tmp_path / "train/HE/a_0.png", pair_files.noise(1))
    with pytest.raises(DataError, match=r"no partner folder: looked for .*train/IHC.*--partner-folder"):
        make_plan(tmp_path, "toy", Options())


def test_bad_files_go_to_quarantine_with_reasons_and_the_rest_is_written(tmp_path):
    """Grey is converted; sizes that differ, 16 bits, CMYK, transparency and a cut PNG are refused one by one."""
    root, rgb = tmp_path / "s", pair_files.noise(5)
    pair_files.bci(root, train=10, test=2)
    faults = {
        0: pair_files.encoded(rgb, mode="L"),
        1: pair_files.encoded(pair_files.noise(6, (16, 24))),
        2: pair_files.encoded(np.arange(256, dtype=np.uint16).reshape(16, 16)),
        3: pair_files.encoded(rgb, "JPEG", mode="CMYK"),
        4: pair_files.encoded(np.dstack([rgb, rgb[..., :1] // 2])),
        5: pair_files.encoded(rgb)[:-30],
        6: b"",
    }
    for number, data in faults.items():
        (root / f"train/IHC/{number:05d}_train_{pair_files.GRADES[number % 4]}.png").write_bytes(data)
    outcome = pair_files.imported(root, tmp_path / "out")
    reasons = {name[:5]: reason for name, reason in rejected(outcome)}
    assert reasons == {
        "00001": "sizes of the pair differ",
        "00002": "more than 8 bits",
        "00003": "CMYK colours",
        "00004": "transparent pixels",
        "00005": "truncated image",
        "00006": "empty file",
    }
    assert len(outcome.manifest.examples) == 6
    sources = (tmp_path / "out/sources.csv").read_text().splitlines()
    assert sources[1].startswith("00000_train_0,train/HE/00000_train_0.png,") and sources[1].endswith("grey to RGB")
    detail = next(item.detail for item in outcome.rejected if item.reason == "sizes of the pair differ")
    assert detail.startswith("16x16 and 16x24 pixels")


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    pair_files.bci(tmp_path / "s", train=1, test=1)
    for path in (tmp_path / "s").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(NothingUsable, match="2 truncated image"):
        pair_files.imported(tmp_path / "s", tmp_path / "out")


def test_labels_that_the_rule_does_not_match_are_named(tmp_path):
    pair_files.write(tmp_path / "HE/tile_17.png", pair_files.noise(1))
    pair_files.write(tmp_path / "IHC/tile_17.png", pair_files.noise(2))
    with pytest.raises(DataError, match=r"does not match 1 of 1 file names, first tile_17\.png: .*--label-rule none"):
        make_plan(tmp_path, "toy", Options())
    assert make_plan(tmp_path, "toy", Options(rule=LabelRule("regex", r"_(\d)"))).facts["class_names"] == ["1"]
    with pytest.raises(DataError, match="no regular expression"):
        LabelRule("regex", "(")
    with pytest.raises(DataError, match=r"--classes a,b: not among them.*'1' \(1\)"):
        make_plan(tmp_path, "toy", Options(rule=LabelRule("regex", r"_(\d)"), classes=("a", "b")))


@pytest.mark.parametrize(
    ("rule", "name", "label"),
    [
        (LabelRule(), "00014_test_1+.png", "1+"),
        (LabelRule(), "x_00014_test_3+.jpeg", "3+"),
        (LabelRule(), "00014_test_4+.png", None),
        (LabelRule("field", index=3), "x_00014_test_0.png", "0"),
        (LabelRule("field", index=3), "00014_test_0.png", None),
    ],
)
def test_D8_the_default_rule_reads_names_of_three_and_of_four_fields(rule, name, label):
    assert rule.label(name) == label


def test_one_size_is_demanded_and_ways_out_are_named(tmp_path):
    pair_files.bci(tmp_path, train=4, test=2)
    for stain in ("HE", "IHC"):
        pair_files.write(tmp_path / f"train/{stain}/00000_train_0.png", pair_files.noise(9, (20, 20)))
    with pytest.raises(DataError, match=r"several sizes: 16x16 \(5\), 20x20 \(1\); .*--resize"):
        make_plan(tmp_path, "toy", Options())
    outcome = pair_files.imported(tmp_path, tmp_path / "out", expect_size=(16, 16))
    assert rejected(outcome) == {("00000_train_0.png", "other size")}
    assert pair_files.imported(tmp_path, tmp_path / "all", resize=(32, 32)).manifest.image_size == (32, 32)
    with pytest.raises(DataError, match=r"no image has 64x64 pixels; found 16x16"):
        make_plan(tmp_path, "toy", Options(expect_size=(64, 64)))


def test_an_odd_size_is_refused_with_the_size_that_fits(tmp_path):
    pair_files.bci(tmp_path, train=1, test=1, size=(20, 20))
    with pytest.raises(DataError, match=r"20x20 pixels do not fit: .*multiples of 8 .*--resize 16x16"):
        make_plan(tmp_path, "toy", Options(multiple_of=8))
    assert make_plan(tmp_path, "toy", Options(multiple_of=8, resize=(24, 24))).facts["image_size"] == [24, 24]


def test_the_bci_download_layout_and_its_flat_form_are_recognised(tmp_path):
    for part, grade in (("train", "2+"), ("test", "0")):
        for stain in ("HE", "IHC"):
            pair_files.write(tmp_path / f"a/{stain}/{part}/00001_{part}_{grade}.png", pair_files.noise(1))
            pair_files.write(tmp_path / f"b/{stain}/00001_{part}_{grade}.png", pair_files.noise(1))
    for name in "ab":
        plan = make_plan(tmp_path / name, "toy", Options())
        assert plan.listing.layout == "bci" and [e.split for e in plan.listing.examples] == ["train", "test"]
        assert plan.facts["class_names"] == ["0", "1+", "2+", "3+"]


def test_mist_has_no_grades_and_its_reported_part_becomes_the_test_part(tmp_path):
    for part in ("train", "val"):
        for side in "AB":
            for name in ("s1_x1", "s2_x1"):
                data = pair_files.encoded(pair_files.noise(1), "JPEG")
                pair_files.write(tmp_path / f"TrainValAB/{part}{side}/{name}.jpg", data)
    plan = make_plan(tmp_path, "toy", Options(group_regex=r"^(s\d+)_"))
    assert plan.listing.layout == "mist" and plan.facts["class_names"] == []
    ids = ["train/s1_x1", "train/s2_x1", "test/s1_x1", "test/s2_x1"]
    assert [e.example_id for e in plan.listing.examples] == ids
    assert [e.group for e in plan.listing.examples] == ["s1", "s2", "s1", "s2"]
    with pytest.raises(DataError, match=r"--group-regex t\(\\d\) does not match 4 of 4 .*could lie in training and in"):
        make_plan(tmp_path, "toy", Options(group_regex=r"t(\d)"))


def test_a_table_gives_paths_labels_groups_parts_and_boxes(tmp_path):
    strip = np.concatenate([pair_files.noise(i) for i in range(2)], axis=1)
    pair_files.write(tmp_path / "x/strip.png", strip)
    rows = [
        "example_id,he_path,ihc_path,label,group,split,he_box,ihc_box",
        "a,x/strip.png,x/strip.png,0,p1,train,0 0 16 16,16 0 32 16",
        "b,x/strip.png,,NA,p2,test,16 0 32 16,",
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    outcome = pair_files.imported(tmp_path / "pairs.csv", tmp_path / "out", missing_partner="keep")
    first, second = outcome.manifest.examples
    assert (first.label, second.label, first.group, second.split) == (0, -1, "p1", "test")
    found = PairReader(outcome.manifest).read(0)
    np.testing.assert_array_equal(found.image, pair_files.noise(0))
    np.testing.assert_array_equal(found.partner, pair_files.noise(1))
    (tmp_path / "bad.csv").write_text("he_path,split\nx/strip.png,holdout\n")
    with pytest.raises(DataError, match="split 'holdout' is unknown"):
        make_plan(tmp_path / "bad.csv", "toy", Options())
    (tmp_path / "lost.csv").write_text("he_path\nx/gone.png\n")
    with pytest.raises(DataError, match=r"lost\.csv, line 2: x/gone\.png does not exist"):
        make_plan(tmp_path / "lost.csv", "toy", Options())


def test_single_images_with_a_table_of_labels_have_no_partners(tmp_path):
    for name in ("A/1.png", "B/2.png", "B/3.png"):
        pair_files.write(tmp_path / name, pair_files.noise(1))
    (tmp_path / "labels.csv").write_text("file,label,group\nA/1.png,A,g\nB/2.png,B,\nB/9.png,B,\n")
    outcome = pair_files.imported(tmp_path, tmp_path / "out")
    assert rejected(outcome) == {("9.png", "file missing"), ("3.png", "not listed")}
    manifest = outcome.manifest
    assert (manifest.partner, manifest.class_names, manifest.examples[0].group) == (False, ("A", "B"), "g")
    with pytest.raises(DataError, match="no known layout"):
        make_plan(tmp_path / "out", "toy", Options())


def test_vectors_are_keyed_by_example_and_checked(tmp_path):
    pair_files.bci(tmp_path / "s", train=3, test=1)
    ids = ["00000_train_0", "00002_train_2+", "00000_test_0"]
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.savez(tmp_path / "v.npz", example_id=ids, values=values, names=["a", "b"])
    manifest = pair_files.imported(tmp_path / "s", tmp_path / "out", vectors=str(tmp_path / "v.npz")).manifest
    assert manifest.vector_size == 2 and [e.has_vector for e in manifest.examples] == [1, 0, 1, 1]
    reader = PairReader(manifest)
    np.testing.assert_array_equal(reader.read(2).vector, [2, 3])
    assert reader.read(1).vector is None
    table = tmp_path / "v.csv"
    table.write_text("example_id,a\n00000_train_0,1\n00001_train_1+,nan\n")
    with pytest.raises(DataError, match=r"00001_train_1\+, a is nan; expected finite numbers"):
        make_plan(tmp_path / "s", "toy", Options(vectors=str(table)))
    table.write_text("example_id,a\n0_train_0,1\n")
    with pytest.raises(DataError, match=r"none of its 1 ids .* is an example"):
        make_plan(tmp_path / "s", "toy", Options(vectors=str(table)))


def test_bags_and_pairs_are_not_confused(whole, tmp_path):
    with pytest.raises(ManifestError, match="the dataset holds pairs, not bags.*data.kind=pairs"):
        Manifest.load(whole.manifest.directory)
    with pytest.raises(ManifestError, match="does not exist"):
        PairManifest.load(tmp_path)


def test_a_damaged_shard_is_named(source, tmp_path):
    manifest = pair_files.imported(source[0], tmp_path / "out").manifest
    path = manifest.directory / manifest.shards[1].file
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-100])
    with pytest.raises(ShardReadError, match="pairs-test.*bytes, the manifest says"):
        PairReader(manifest.directory)


def test_records_are_protocol_buffers_with_a_checksum():
    contents = codec.Contents(True, 2)
    record = codec.PairRecord("a", "g", -1, b"i" * 300, None, np.array([1, 2], np.float32))
    data = codec.encode(record, contents)
    found = codec.decode(data, contents)
    assert found[:5] == ("a", "g", -1, b"i" * 300, None) and found.vector.tolist() == [1, 2]
    flipped = bytearray(data)
    flipped[data.index(b"iii") + 5] ^= 1
    with pytest.raises(ValueError, match="checksum mismatch"):
        codec.decode(bytes(flipped), contents)
    for cut in (3, 40, len(data) - 1):
        with pytest.raises(ValueError):
            codec.decode(data[:cut], contents)
    with pytest.raises(ValueError, match="framing"):
        codec.decode(data, codec.Contents(False, 2))
    with pytest.raises(ValueError, match="3 numbers, expected 2"):
        codec.encode(record._replace(vector=np.zeros(3, np.float32)), contents)
