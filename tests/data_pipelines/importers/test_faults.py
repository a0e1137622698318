"""Bad folders: each fault is quarantined with its reason, or refused with a message naming the culprit and the fix."""

import builtins
import csv
import subprocess
import sys
import unicodedata

import feature_folders as folders
import h5py
import numpy as np
import pytest
from test_layouts import CONTENT, check_content, imported

from data_pipelines.errors import DataError
from data_pipelines.importers import header, plan, reading
from data_pipelines.importers.cases import CaseRule, assign

GOOD = folders.BRCA[0]
ONE = {GOOD: CONTENT[GOOD]}


@pytest.fixture
def root(tmp_path):
    """A CLAM folder with one good slide; faults are put beside it."""
    return folders.clam(tmp_path / "clam", ONE, pt=False, patches=False)


def quarantined(root, out, name="TCGA-A1-0001-DX1", **options):
    """(reason, detail) of the only quarantined file; the good slide is imported."""
    _, outcome = imported(root, out, **options)
    (item,) = outcome.rejected
    assert item.slide_id == name and [s.slide_id for s in outcome.manifest.slides] == [GOOD]
    with open(out / "quarantine.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [item._asdict()]
    assert str(root) not in item.detail
    return item.reason, item.detail


def test_zero_byte_h5(root, tmp_path):
    (root / "h5_files" / "TCGA-A1-0001-DX1.h5").touch()
    assert quarantined(root, tmp_path / "out") == ("zero bytes", "the file is empty")


@pytest.mark.parametrize("content", [b"not HDF5 at all", None])
def test_damaged_h5(root, tmp_path, content):
    path = root / "h5_files" / "TCGA-A1-0001-DX1.h5"
    whole = (root / "h5_files" / f"{GOOD}.h5").read_bytes()
    path.write_bytes(content or whole[: len(whole) // 2])
    assert quarantined(root, tmp_path / "out")[0] == "unreadable"


def test_h5_damaged_in_its_data_only_is_found_while_reading(root, tmp_path):
    features, coords = folders.bag(9, n=200)
    path = root / "h5_files" / "TCGA-A1-0001-DX1.h5"
    folders.h5(path, {"features": features, "coords": coords.astype(np.int32)}, compression="gzip", chunks=True)
    with h5py.File(path) as file:
        place = file["features"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[place.byte_offset : place.byte_offset + place.size] = bytes(place.size)
    path.write_bytes(content)
    assert quarantined(root, tmp_path / "out")[0] == "unreadable"


def test_h5_open_for_writing_elsewhere_is_locked(root, tmp_path):
    path = root / "h5_files" / "TCGA-A1-0001-DX1.h5"
    code = "import h5py, sys; f = h5py.File(sys.argv[1], 'w'); f['features'] = [[1.0]]; f.flush(); print(1); input()"
    command = [sys.executable, "-uc", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline()
        reason, detail = quarantined(root, tmp_path / "out")
        writer.communicate(b"\n")
    assert reason == "locked" and "open for writing" in detail


@pytest.mark.parametrize("lock", ["TCGA-A1-0001-DX1.h5.lock", "TCGA-A1-0001-DX1.lock"])
def test_lock_file_of_a_running_writer(root, tmp_path, lock):
    folders.clam(root, {"TCGA-A1-0001-DX1": CONTENT[GOOD]}, pt=False, patches=False)
    (root / "h5_files" / lock).write_text("")
    reason, detail = quarantined(root, tmp_path / "out")
    assert reason == "locked" and lock in detail


@pytest.mark.parametrize(
    ("value", "dtype", "reason"),
    [(np.nan, "float16", "not finite"), (np.inf, "float32", "not finite"), (7e4, "float16", "not finite")],
)
def test_values_that_are_not_finite_in_the_stored_type(root, tmp_path, value, dtype, reason):
    features, coords = CONTENT[GOOD]
    features = features.copy()
    features[2, 3] = value
    folders.clam(root, {"TCGA-A1-0001-DX1": (features, coords)}, pt=False, patches=False)
    found, detail = quarantined(root, tmp_path / "out", dtype=dtype)
    assert found == reason and "features[2, 3]" in detail


def test_other_arrays_and_other_numbers_of_coordinates(root, tmp_path):
    features, coords = CONTENT[GOOD]
    faults = {
        "TCGA-A1-0001-DX1": ({"feats_of_mine": features}, "no features"),
        "TCGA-A1-0002-DX1": ({"features": features, "coords": coords[:-1]}, "bad coords"),
        "TCGA-A1-0003-DX1": ({"features": features[0]}, "slide-level"),
        "TCGA-A1-0004-DX1": ({"features": features.astype(np.int32)}, "no features"),
        "TCGA-A1-0005-DX1": ({"features": features, "coords": coords + 0.5}, "bad coords"),
        "TCGA-A1-0006-DX1": ({"features": features, "coords": coords + 2**40}, "bad coords"),
        "TCGA-A1-0007-DX1": ({"features": np.zeros((2, 3, 4), np.float32)}, "no features"),
    }
    for slide, (arrays, _) in faults.items():
        folders.h5(root / "h5_files" / f"{slide}.h5", arrays)
    _, outcome = imported(root, tmp_path / "out")
    assert {item.slide_id: item.reason for item in outcome.rejected} == {s: reason for s, (_, reason) in faults.items()}


def test_pickle_that_would_run_code_is_not_run(root, tmp_path):
    folders.evil_pt(root / "pt_files" / "TCGA-A1-0001-DX1.pt", tmp_path / "ran")
    reason, detail = quarantined(root, tmp_path / "out")
    assert reason == "unsafe pickle" and "os.system" in detail and not (tmp_path / "ran").exists()


def test_object_arrays_are_not_unpickled(tmp_path):
    np.save(tmp_path / "TCGA-A1-A0SB-1.npy", np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "TCGA-A1-A0SD-1.npz", features=np.array([{"a": 1}], dtype=object))
    with pytest.raises(plan.NothingUsable, match="2 unreadable.*Python objects"):
        imported(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", [" TCGA-A1-A0SB-1 ", "TCGA-A1-A0SB\x07"])
def test_ids_that_are_no_keys(root, tmp_path, name):
    folders.clam(root, {name: CONTENT[GOOD]}, pt=False, patches=False)
    assert quarantined(root, tmp_path / "out", name)[0] == "bad id"


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "..\\..\\b"])
def test_path_traversal_in_a_table_of_cases(root, tmp_path, name):
    table = tmp_path / "slides.csv"
    table.write_text(f"slide_id,case_id\n{GOOD},p\n{name},q\n")
    with pytest.raises(DataError, match="line 3: .* is no slide id"):
        imported(root, tmp_path / "out", rule=CaseRule(table=str(table)))
    table.write_text(f"slide_id,case_id\n{GOOD},{name}\n")
    with pytest.raises(DataError, match="line 2: .*case_id is .*path separators"):
        imported(root, tmp_path / "out", rule=CaseRule(table=str(table)))


def test_ids_with_dots_and_beyond_ascii(tmp_path):
    """A suffix is removed, not characters; names that a file system decomposed are composed, as tables have them."""
    names = ["a.b.c.svs", "slides.svs.", "Gewebe-Ä-№7", "組織.1"]
    content = {name: folders.bag(i) for i, name in enumerate(names)}
    written = {unicodedata.normalize("NFD", name): bag for name, bag in content.items()}
    folders.clam(tmp_path / "clam", written, pt=False, patches=False)
    _, outcome = imported(tmp_path / "clam", tmp_path / "out", rule=CaseRule(own=True))
    assert [slide.slide_id for slide in outcome.manifest.slides] == sorted(names)
    assert [slide.case_id for slide in outcome.manifest.slides] == sorted(names)


@pytest.mark.parametrize("pair", [("a/x.npy", "b/x.npy"), ("x.npy", "x.npz"), ("\u00c4.npy", "A\u0308.npy")])
def test_duplicate_slide_ids_are_listed(tmp_path, pair):
    for name in pair:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        with open(tmp_path / "in" / name, "wb") as file:
            np.savez(file, features=CONTENT[GOOD][0]) if name.endswith("z") else np.save(file, CONTENT[GOOD][0])
    with pytest.raises(DataError, match="1 slide ids occur in several files.*--exclude") as caught:
        imported(tmp_path / "in", tmp_path / "out", rule=CaseRule(own=True))
    assert pair[0] in str(caught.value) and pair[1] in str(caught.value)
    imported(tmp_path / "in", tmp_path / "out", rule=CaseRule(own=True), exclude=(pair[1],))


@pytest.mark.parametrize("field", ["encoder", "magnification", "width", "mpp"])
def test_mixtures_are_refused_with_the_list(tmp_path, field):
    first, second = dict(list(CONTENT.items())[:3]), dict(list(CONTENT.items())[3:])
    if field == "mpp":
        folders.stamp(tmp_path / "in", first, unit="px")
        folders.stamp(tmp_path / "in", second, unit="px", tile_size_um=512.0)
    else:
        second = folders.bags(dim=5) if field == "width" else second
        folders.trident(tmp_path / "in", first)
        folder = folders.trident(tmp_path / "other", second, encoder="conch" if field == "encoder" else "uni_v1")
        for path in folder.glob(f"{folders.BRCA[3]}.h5"):
            with h5py.File(path, "a") as file:
                file["coords"].attrs["target_magnification"] = 40 if field == "magnification" else 20
            path.rename(tmp_path / "in" / "20x_256px_0px_overlap" / "features_uni_v1" / path.name)
    name = {"width": "feat_dim"}.get(field, field)
    with pytest.raises(DataError, match=f"one {name}, and the files have several") as caught:
        imported(tmp_path / "in", tmp_path / "out")
    assert f"{folders.BRCA[3]}.h5" in str(caught.value) and "3 files" in str(caught.value)


def test_options_fill_gaps_and_may_not_contradict(tmp_path):
    folders.trident(tmp_path / "job", CONTENT)
    _, outcome = imported(tmp_path / "job", tmp_path / "out", mpp=0.5, encoder_licence="CC-BY-NC")
    assert outcome.manifest.mpp == 0.5 and outcome.manifest.encoder["licence"] == "CC-BY-NC"
    for options in ({"magnification": 40.0}, {"encoder": "uni"}, {"patch_size_level0": 224.0}):
        with pytest.raises(DataError, match="by the command line"):
            imported(tmp_path / "job", tmp_path / "no", **options)


def test_cases_by_barcode_regex_table_or_slide():
    slides = [*folders.BRCA]
    assert assign(slides, CaseRule()).case_of[slides[2]] == "TCGA-A1-A0SD"
    assert assign(["S1_P7", "S2_P8"], CaseRule(regex=r"_(P\d)")).case_of == {"S1_P7": "P7", "S2_P8": "P8"}
    assert assign(["S1_P7"], CaseRule(regex=r"(?P<x>S)\d_(?P<case>P\d)")).case_of == {"S1_P7": "P7"}
    assert assign(["S1"], CaseRule(own=True)).case_of == {"S1": "S1"}


@pytest.mark.parametrize(
    ("slides", "rule", "message"),
    [
        (["S1", folders.BRCA[0]], CaseRule(), "1 of 2 slide ids are no TCGA barcodes .*'S1'.*--cases TABLE"),
        (["TCGA-A1-A0SB1"], CaseRule(), "no TCGA barcodes"),
        (["S1"], CaseRule(regex="(P"), "is no regular expression"),
        (["S1"], CaseRule(regex="P"), "finds no case in the slide id 'S1'"),
        (["S1"], CaseRule(regex="P", own=True), "at most one"),
    ],
)
def test_cases_that_cannot_be_found(slides, rule, message):
    with pytest.raises(DataError, match=message):
        assign(slides, rule)


def test_table_of_cases_with_bom_semicolons_other_names_and_gaps(tmp_path):
    table = tmp_path / "slides.csv"
    table.write_bytes("\ufeffPATIENT;FILENAME;x\nP1;sub/a.h5;1\nP2;b.svs;2\nP9;zz;3\n".encode())
    found = assign(["a", "b.svs", "c"], CaseRule(table=str(table)))
    assert found.case_of == {"a": "P1", "b.svs": "P2"}
    assert found.not_listed == ("c",) and found.no_file == ("zz",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide_id,case\na,P1\n", "none of the columns case_id"),
        ("slide_id,case_id\na,P1\na,P2\n", "line 3: slide 'a' has case 'P2' here and 'P1' before"),
        ("slide_id,case_id,case_id\na,P1,P2\n", "column 'case_id' occurs 2 times"),
        ("slide_id,case_id\na,\n", "line 2: .*case_id is ''"),
        ("slide_id,case_id,level0_mpp\na,P1,half\n", "'half' is no size of a pixel"),
        ("slide_id,case_id\nb,P1\n", "lists none of the 1 slides"),
        ("", "the file is empty"),
        ("slide_id,case_id\na\n", "line 2: .*case_id is ''"),
        ("slide_id,case_id\na,P1,x\n", "rows differ in their number of cells"),
    ],
)
def test_bad_tables_of_cases(tmp_path, text, message):
    (tmp_path / "slides.csv").write_text(text)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", CONTENT[GOOD][0])
    with pytest.raises(DataError, match=message):
        imported(tmp_path / "in", tmp_path / "out", rule=CaseRule(table=str(tmp_path / "slides.csv")))


def test_slides_that_the_table_does_not_list_are_quarantined(tmp_path):
    folders.clam(tmp_path / "clam", CONTENT, patches=False)
    (tmp_path / "t.csv").write_text(f"slide_id,case_id\n{GOOD},{GOOD[:12]}\n")
    _, outcome = imported(tmp_path / "clam", tmp_path / "out", rule=CaseRule(table=str(tmp_path / "t.csv")))
    assert {item.reason for item in outcome.rejected} == {"not in the table"} and len(outcome.rejected) == 3
    check_content(tmp_path / "out", ONE)


def test_a_missing_library_is_named_with_its_remedy(root, tmp_path, monkeypatch):
    load = builtins.__import__

    def refuse(name, *args, **options):
        if name == "h5py":
            raise ImportError(name)
        return load(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=r"pip install 'histokd_jax\[import\]'"):
        imported(root, tmp_path / "out")


def test_units_of_coordinates_against_arithmetic_by_hand():
    xy = np.array([[0, 256], [512, 128]], np.float32)
    np.testing.assert_array_equal(reading.place(xy, "um", "level0", 0.25), [[0, 1024], [2048, 512]])
    np.testing.assert_array_equal(
        reading.place(xy * 0.875, "px of 224 = 256 um", "level0", 0.5), [[0, 512], [1024, 256]]
    )
    with pytest.raises(ValueError, match="NaN"):
        reading.place(xy * np.nan, "um", "level0", 0.25)


def test_attributes_as_text_json_and_bytes(tmp_path):
    values = {"a": np.bytes_(b"x"), "b": "None", "c": '{"k": 1}', "d": (2.0, 2.0), "e": np.int64(3), "f": "{broken"}
    folders.h5(tmp_path / "f.h5", {"features": np.zeros((2, 3), np.float16)}, {"features": values})
    found = header.read_header(tmp_path / "f.h5")
    assert found.arrays == {"features": ((2, 3), "float16")}
    assert found.of("features") == {"a": "x", "b": "None", "c": {"k": 1}, "d": [2.0, 2.0], "e": 3, "f": "{broken"}


@pytest.mark.real_data
def test_every_real_feature_file_is_imported_or_refused_for_the_right_reason(real_data, tmp_path):
    layout, outcome = imported(real_data / "feature_bags" / "mopadi", tmp_path / "mopadi")
    (slide,) = outcome.manifest.slides
    assert layout == "stamp" and outcome.rejected == () and outcome.manifest.feat_dim == 512
    assert (slide.slide_id, slide.case_id, slide.n_patches) == ("TCGA-AD-6964-01Z-00-DX1", "TCGA-AD-6964", 777)
    with h5py.File(real_data / "feature_bags" / "mopadi" / slide.slide_id / "features.h5") as file:
        check_content(tmp_path / "mopadi", {slide.slide_id: (file["feats"][:], file["coords"][:])})
    cells = real_data / "feature_bags" / "glioma_cell_graphs" / "cells"
    with pytest.raises(plan.NothingUsable, match="2 no features.*holds x .*1036.*--features-key"):
        imported(cells, tmp_path / "no")
    _, outcome = imported(cells, tmp_path / "cells", features_key="x", coords_key="centroid")
    assert [s.n_patches for s in outcome.manifest.slides] == [667, 373] and outcome.manifest.feat_dim == 1036
    with np.load(cells / f"{outcome.manifest.slides[1].slide_id}.npz") as stored:
        first = dict(stored)
    with np.load(cells / f"{outcome.manifest.slides[0].slide_id}.npz") as stored:
        content = {s.slide_id: (a["x"], a["centroid"]) for s, a in zip(outcome.manifest.slides, (stored, first))}
    check_content(tmp_path / "cells", content)
