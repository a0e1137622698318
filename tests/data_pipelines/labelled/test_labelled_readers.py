"""Readers of labelled patches: what they find, and what they refuse by name."""

import numpy as np
import pytest
from labelled_setup import blobs, picture, pictures, write_folder
from pair_files import imported, noise, write

from data_pipelines.errors import DataError
from data_pipelines.labelled.arrays import read_arrays, read_features
from data_pipelines.labelled.folder import read_folder
from data_pipelines.labelled.opening import open_patches


def test_a_folder_with_a_table_gives_images_labels_and_groups(tmp_path):
    found = open_patches(write_folder(tmp_path / "set", per_class=4))
    assert found.class_names == ("benign", "malignant") and found.counts() == {"benign": 4, "malignant": 4}
    row = found.ids.index("malignant/01.png")
    assert found.group[row] == "slide_1_0" and found.label[row] == 1
    np.testing.assert_array_equal(found.read(row), picture(1, 3))
    assert open_patches(tmp_path / "set").fingerprint() == found.fingerprint()
    write(tmp_path / "set" / "benign" / "00.png", noise(99, (32, 32)))
    assert open_patches(tmp_path / "set").fingerprint() != found.fingerprint()


def test_class_folders_below_official_parts_need_no_table(tmp_path):
    for i, (part, label) in enumerate([("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")]):
        write(tmp_path / part / label / f"{i}.png", noise(i))
    found = read_folder(tmp_path)
    assert dict(zip(found.ids, found.part))["test/b/3.png"] == "test"
    assert found.class_names == ("a", "b") and found.label.tolist() == [0, 1, 0, 1]


def test_label_missing_is_refused_by_name_or_left_out_when_asked(tmp_path):
    write_folder(tmp_path, per_class=3, **{"benign/01.png": ""})
    with pytest.raises(DataError, match="1 of 6 patches have no label, first benign/01.png.*--leave-out-unlabelled"):
        read_folder(tmp_path)
    found = read_folder(tmp_path, unlabelled="leave_out")
    assert len(found) == 5 and "1 patches without a label are left out" in found.notes
    np.testing.assert_array_equal(found.read(found.ids.index("malignant/01.png")), picture(1, 3))


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ("file,klass\nx.png,a\n", "no column 'label'"),
        ("file,label\nx.png,a\nnope.png,b\n", "1 of 2 files do not exist.*'nope.png'"),
        ("file,label\nx.png,a\nx.png,b\n", "occur twice.*x.png"),
        ("file,label\nx.png,a\ny.png,a\n", "all 2 patches have the class 'a'"),
        ("file,label\nx.png,\ny.png,NA\n", "none of 2 patches has a label"),
        ("file,label,part\nx.png,a,train\ny.png,b,holdout\n", "'y.png' has the part 'holdout'"),
    ],
)
def test_a_table_that_contradicts_the_folder_is_refused(tmp_path, table, named):
    for name in ("x.png", "y.png"):
        write(tmp_path / name, noise(1))
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(DataError, match=named):
        read_folder(tmp_path)


def test_a_damaged_image_is_named_when_it_is_read(tmp_path):
    write_folder(tmp_path, per_class=2)
    write(tmp_path / "benign" / "00.png", b"\x89PNG nothing")
    found = read_folder(tmp_path)
    with pytest.raises(DataError, match="benign/00.png: not decodable"):
        found.read(found.ids.index("benign/00.png"))


def test_loose_images_without_a_table_are_refused(tmp_path):
    write(tmp_path / "x.png", noise(1))
    with pytest.raises(DataError, match="lies in no class folder"):
        read_folder(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        open_patches(tmp_path / "nothing")


def test_arrays_with_labels_names_groups_order_and_features(tmp_path):
    x, label = blobs(12)
    names = np.array(["a", "b", "c"])
    np.savez(tmp_path / "t.npz", strong=x, weak=x[:, :2], label=label, class_names=names, source_row=np.arange(12))
    found = open_patches(tmp_path / "t.npz")
    assert sorted(found.arrays) == ["strong", "weak"] and found.read is None and found.name == "t"
    np.testing.assert_array_equal(found.arrays["weak"], x[:, :2])
    np.testing.assert_array_equal(found.order, np.arange(12))
    assert found.class_names == ("a", "b", "c") and found.ids[3] == "3"


def test_arrays_of_images(tmp_path):
    images, label = pictures(2)
    np.savez(tmp_path / "i.npz", images=images, label=np.array(["neg", "pos"])[label], group=np.array(list("aabb")))
    found = open_patches(tmp_path / "i.npz")
    np.testing.assert_array_equal(found.read(2), images[2])
    assert found.group == ("a", "a", "b", "b") and found.class_names == ("neg", "pos")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"label": None}, "no array label"),
        ({"label": np.array([0, 1, -1, 1])}, "1 of 4 patches have no label, first 2"),
        ({"x": np.zeros((3, 2))}, "array x: 3 rows of features for 4 patches"),
        ({"x": None}, "neither images .* nor feature arrays"),
        ({"group": np.array(["a"])}, r"array of groups has the shape \(1,\)"),
        ({"class_names": np.array(["only"])}, "row 1 has the label 1, class_names has 1"),
        ({"images": np.zeros((4, 8, 8, 3), np.float32)}, "images are float32"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, changes, named):
    arrays = {"x": np.ones((4, 2)), "label": np.array([0, 1, 0, 1])} | changes
    np.savez(tmp_path / "bad.npz", **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(DataError, match=named):
        read_arrays(tmp_path / "bad.npz")


def test_features_follow_the_ids_of_the_patches(tmp_path):
    x, _ = blobs(6)
    np.savez(tmp_path / "f.npz", features=x[::-1], ids=np.array([f"p{i}" for i in range(6)][::-1]))
    np.testing.assert_array_equal(read_features(tmp_path / "f.npz", "", ["p4", "p0"]), x[[4, 0]])
    with pytest.raises(DataError, match="no features for 1 of 2 patches, first .'q'"):
        read_features(tmp_path / "f.npz", "", ["p4", "q"])
    with pytest.raises(DataError, match="no feature array 'other'"):
        read_features(tmp_path / "f.npz", "other", ["p4"])
    np.save(tmp_path / "f.npy", x)
    with pytest.raises(DataError, match="6 rows of features for 2 patches"):
        read_features(tmp_path / "f.npy", "", ["p4", "p0"])


def test_a_file_with_pickled_objects_is_refused_without_running_it(tmp_path):
    np.savez(tmp_path / "p.npz", label=np.array([{"a": 1}], object))
    with pytest.raises(DataError, match="without pickled objects"):
        read_arrays(tmp_path / "p.npz")


def pair_source(root, n=8):
    """Table of single images and vectors; one without a label, one in no group."""
    lines, vectors = ["he_path,ihc_path,label,group,split"], ["example_id,g1,g2"]
    for i in range(n):
        for stain, seed in (("he", i), ("ihc", 100 + i)):
            write(root / f"{stain}{i}.png", noise(seed))
        lines.append(f"he{i}.png,ihc{i}.png,{'' if i == 5 else 'ab'[i % 2]},g{i // 2},{'train' if i < 6 else 'test'}")
        vectors.append(f"he{i},{i}.5,1")
    (root / "pairs.csv").write_text("\n".join(lines) + "\n")
    (root / "vectors.csv").write_text("\n".join(vectors) + "\n")
    return root / "pairs.csv"


def test_a_pair_data_set_with_labels_gives_its_images_partners_and_vectors(tmp_path):
    table = pair_source(tmp_path / "source")
    imported(table, tmp_path / "set", vectors=str(tmp_path / "source" / "vectors.csv"))
    with pytest.raises(DataError, match="1 of 8 patches have no label, first he5"):
        open_patches(tmp_path / "set")
    found = open_patches(tmp_path / "set", unlabelled="leave_out")
    row = found.ids.index("he6")
    assert len(found) == 7 and found.part[row] == "test" and found.group[row] == "g3"
    np.testing.assert_array_equal(found.read(row), noise(6))
    np.testing.assert_array_equal(found.arrays["vector"][row], [6.5, 1])
    other = open_patches(tmp_path / "set", which="partner", unlabelled="leave_out")
    np.testing.assert_array_equal(other.read(row), noise(106))
    assert other.fingerprint() != found.fingerprint()
    with pytest.raises(DataError, match="needs a pair data set"):
        open_patches(tmp_path / "source", which="partner")
