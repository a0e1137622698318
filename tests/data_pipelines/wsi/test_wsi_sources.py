"""Which slides a folder or a table holds, and under which ids."""

import pathlib
import unicodedata

import pytest

from data_pipelines.errors import DataError
from data_pipelines.wsi import sources
from data_pipelines.wsi.sources import find_slides, slide_id_of


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("TCGA-A1-0001-01Z-00-DX1.1F2A.svs", "TCGA-A1-0001-01Z-00-DX1.1F2A"),
        ("a/b/s.ome.tiff", "s"),
        ("S.v1.2.NDPI", "S.v1.2"),
        (unicodedata.normalize("NFD", "Schnitt Ä.mrxs"), "Schnitt Ä"),
        ("no suffix", "no suffix"),
    ],
)
def test_ids_are_file_names_without_the_suffix(name, wanted):
    assert slide_id_of(name) == wanted


def test_folders_are_searched_and_other_files_left_out(tmp_path):
    touch(
        tmp_path,
        "uuid1/A.1.svs",
        "uuid2/b.ndpi",
        "c.TIFF",
        ".hidden/d.svs",
        "m/Data0001.dat",
        "m.mrxs",
        "x.txt",
        "._a.svs",
    )
    found = find_slides(tmp_path)
    assert [(s.slide_id, s.file) for s in found] == [
        ("A.1", "uuid1/A.1.svs"), ("b", "uuid2/b.ndpi"), ("c", "c.TIFF"), ("m", "m.mrxs")
    ]  # fmt: skip
    assert [s.slide_id for s in find_slides(tmp_path, exclude=["*.svs", "m.*"])] == ["b", "c"]
    assert [s.slide_id for s in find_slides(tmp_path / "c.TIFF")] == ["c"]


@pytest.mark.parametrize("names", [("a/s.svs", "b/s.svs"), ("s.svs", "s.tiff"), ("S.svs", "b/s.svs")])
def test_an_id_that_occurs_twice_is_refused_with_both_files(tmp_path, names):
    with pytest.raises(DataError, match="1 slide ids occur in several files") as caught:
        find_slides(touch(tmp_path, *names))
    assert all(name in str(caught.value) for name in names)


def test_decomposed_and_composed_names_are_one_id(tmp_path):
    names = [unicodedata.normalize(form, f"{form}/Ä.svs") for form in ("NFC", "NFD")]
    with pytest.raises(DataError, match="occur in several files"):
        find_slides(touch(tmp_path, *names))


def test_an_empty_or_missing_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="no slide"):
        find_slides(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        find_slides(tmp_path / "nowhere")


def test_files_of_one_dicom_series_are_one_slide(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.dcm", "a/2.dcm", "a/3.dcm", "b/9.dcm", "b/bad.dcm", "b/worse.dcm", "c/4.dcm")
    series = {"1.dcm": "A", "2.dcm": "A", "3.dcm": "B", "9.dcm": "A"}
    monkeypatch.setattr(sources, "series_of", lambda path: series.get(path.name))
    assert [s.file for s in find_slides(tmp_path)] == [
        "a/1.dcm",
        "a/3.dcm",
        "c/4.dcm",
        "b/9.dcm",
        "b/bad.dcm",
        "b/worse.dcm",
    ]


def table(tmp_path, text):
    (tmp_path / "slides.csv").write_text(text, encoding="utf-8")
    return str(tmp_path / "slides.csv")


def test_a_table_chooses_slides_and_names_them(tmp_path):
    touch(tmp_path, "a/s.svs", "b/s.svs", "t.svs")
    found = find_slides(tmp_path, table=table(tmp_path, "\ufefffile;slide_id;mpp\na/s.svs;one;0.25\nb/s.svs;;\n"))
    assert [(s.slide_id, s.file, s.mpp) for s in found] == [("one", "a/s.svs", 0.25), ("s", "b/s.svs", None)]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("file,slide_id\nt.svs,../../evil\n", "line 2.*path separators"),
        ("file,slide_id\nt.svs,a/b\n", "path separators"),
        ("file,slide_id\nt.svs,..\n", "path separators"),
        ("file\n../t.svs\n", "no relative name"),
        ("file\n/etc/passwd\n", "no relative name"),
        ("file\nnone.svs\n", "has no file 'none.svs'"),
        ("file,mpp\nt.svs,zero\n", "line 2, column 'mpp': 'zero'"),
        ("file,mpp\nt.svs,0\n", "column 'mpp': '0'"),
        ("file,slide_id\nt.svs,a\nt.svs,a\n", "occur in several files"),
        ("slide\nt.svs\n", "no column 'file'"),
    ],
)
def test_bad_tables_are_refused_with_the_line(tmp_path, text, named):
    touch(tmp_path, "t.svs")
    with pytest.raises(DataError, match=named):
        find_slides(tmp_path, table=table(tmp_path, text))


def test_a_name_that_cannot_be_an_id_is_refused(tmp_path):
    touch(tmp_path, " .svs")
    with pytest.raises(DataError, match="slide_id is ' '"):
        find_slides(pathlib.Path(tmp_path))
