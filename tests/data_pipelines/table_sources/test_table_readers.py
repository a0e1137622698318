"""Every layout of foreign tables is recognised by its columns and read by name; expected values are written by hand."""

import foreign_tables as foreign
import numpy as np
import pytest
from foreign_tables import A, B, C

from data_pipelines.errors import DataError
from data_pipelines.table_sources import detect
from data_pipelines.table_sources.contents import Options, merge


def read(*paths, wanted="auto", **options):
    """(layouts, contents of all files together)"""
    found = detect.read_all(paths, Options(**options), wanted)
    return [item.layout for item in found], merge([item.contents for item in found])


def follow_up(contents, endpoint="os"):
    table = contents.follow_up[endpoint]
    return dict(zip(table.case_id, zip(table.survival.time_months.tolist(), table.survival.event.tolist())))


@pytest.mark.parametrize("order", ["porpoise", "mcat"])
def test_mcat_and_porpoise_are_read_by_name_whatever_the_order(tmp_path, order):
    layouts, found = read(foreign.mcat(tmp_path / "tcga_toy_all_clean.csv.zip", order=order))
    assert layouts == ["mcat"]
    assert found.labels["oncotree_code"] == {A: "IDC", B: "ILC", C: "IDC"}
    assert found.labels["age"] == {A: "63", B: "", C: "71.0"}, "blank age and sex"
    assert follow_up(found) == {A: (10.5, True), B: (20.0, False), C: (3.25, False)}, "censorship 1 = censored"
    assert found.genes.case_id == (A, B, C) and found.genes.n_conflicting_rows == 0
    assert found.genes.names == ("TP53_rnaseq", "FGF4_rnaseq", "MYC_cnv", "KRAS_mut") and found.scale == "z-score"
    expected = [[0.5, 36893.2, -1, 1], [-0.25, 1.5, 2, 0], [0.125, -2.5, 0, 0]]
    np.testing.assert_array_equal(found.genes.values, np.array(expected, np.float32))
    assert found.slides == {slide: case for case, slide in foreign.SLIDES}, "several slides per patient, no extension"
    assert [item.name for item in found.left_out] == ["site", "train"]


def test_mcat_bare_gene_symbols_are_mutations(tmp_path):
    _, found = read(foreign.mcat(tmp_path / "t.csv.zip", extra="bare"))
    assert found.genes.names[-1] == "KRAS_mut" and "bare gene symbols" in found.notes[0]
    path = foreign.put(tmp_path / "t.csv", f"case_id,slide_id,survival_months,censorship,weight\n{A},s,1,0,71.5\n")
    with pytest.raises(DataError, match="neither known, nor named.*'weight'"):
        read(path)


def test_survpath_folder(tmp_path):
    layouts, found = read(foreign.survpath(tmp_path / "datasets_csv"))
    assert layouts == ["survpath", "labels", "expression", "groups"]
    assert follow_up(found) == {A: (10.5, True), B: (20.0, False), C: (3.25, False)}
    assert follow_up(found, "pfi") == {A: (4.0, True), B: (20.0, False), C: (3.0, True)}
    dss = follow_up(found, "dss")
    assert dss[A] == (10.5, False) and np.isnan(dss[C][0]), "a blank endpoint is no follow-up"
    assert found.genes.case_id == (C, A) and found.genes.names[:2] == ("G0_rnaseq", "G1_rnaseq")
    assert found.scale == "log" and found.genes.values[0, 1] == np.float32(0.25)
    assert found.labels["grade"] == {A: "", "P-0000674": "G2"} and found.labels["stage"]["P-0000674"] == ""
    assert found.groups == {"PATH_A": ("G0", "G1"), "PATH_B": ("G1",)}


def test_survpath_folder_of_several_studies_and_collections_asks(tmp_path):
    root = foreign.survpath(tmp_path, studies=("one", "two"), collections=("xena", "combine"))
    with pytest.raises(DataError, match=r"studies \['one', 'two'\].*--study"):
        read(root)
    with pytest.raises(DataError, match=r"\['combine', 'xena'\].*--pathways"):
        read(root, study="two")
    layouts, found = read(root, study="tcga_two", pathways="combine")
    assert layouts == ["survpath", "labels", "expression", "groups"] and set(found.groups) == {"PATH_A", "PATH_B"}
    with pytest.raises(DataError, match="--pathways hallmarks"):
        read(root, study="two", pathways="hallmarks")


def test_mmp_folder_days_become_months_and_folders_become_folds(tmp_path):
    layouts, found = read(foreign.mmp(tmp_path))
    assert layouts == ["mmp"]
    assert follow_up(found) == {A: (12.0, True), B: (24.0, False), C: (pytest.approx(360 / 365.25), True)}
    assert np.isnan(follow_up(found, "dss")[B][0])
    assert found.folds == {0: {"test": (A,), "train": (B, C)}, 1: {"test": (B,), "train": (A, C)}}
    assert [item.name for item in found.left_out] == ["project_id"]
    foreign.mmp(tmp_path, study="TCGA_KIRC_overall_survival")
    with pytest.raises(DataError, match="--study"):
        read(tmp_path)
    assert len(read(tmp_path, study="TCGA_KIRC_overall_survival")[1].folds) == 2


def test_mmp_files_that_do_not_say_their_fold_or_disagree(tmp_path):
    root = foreign.mmp(tmp_path)
    stray = (root / "TCGA_BRCA_overall_survival_k=0" / "train.csv").rename(tmp_path / "train.csv")
    with pytest.raises(DataError, match="STUDY_k=FOLD"):
        read(stray)
    with pytest.raises(DataError, match=r"\['test.csv'\]; expected train.csv and test.csv"):
        read(root)
    foreign.mmp(root)
    other = root / "TCGA_BRCA_overall_survival_k=1" / "train.csv"
    other.write_text(other.read_text().replace("365.25,0", "99,0"))
    with pytest.raises(DataError, match=f"{A}.*in one file"):
        read(root)


def test_patho_bench(tmp_path):
    layouts, found = read(foreign.patho_bench(tmp_path / "k=all.tsv"))
    assert layouts == ["patho-bench"] and found.labels == {"status": {A: "pos", B: "neg", C: "neg"}}
    assert found.folds[0] == {"train": (A,), "val": (B,), "test": (C,)}
    assert found.folds[1] == {"train": (B, C), "test": (A,)}
    path = foreign.put(tmp_path / "k.tsv", f"case_id\tslide_id\tfold_0\n{A}\ts\tdev\n")
    with pytest.raises(DataError, match="line 2, column 'fold_0': 'dev' is none of train, val, test"):
        read(path)


def test_clam_gigapath_and_tables_without_cases(tmp_path):
    clam = foreign.put(tmp_path / "c.csv", "case_id,slide_id,label\np0,s_1,tumor\np0,s_2,tumor\np1,s.3,normal\n")
    layouts, found = read(clam)
    assert layouts == ["clam"] and found.labels == {"label": {"p0": "tumor", "p1": "normal"}}
    assert found.slides == {"s_1": "p0", "s_2": "p0", "s.3": "p1"}, "only a known extension is removed"
    _, found = read(foreign.put(tmp_path / "g.csv", "slide_id,pat_id,label\ns1.svs,p1,0\n"))
    assert found.slides == {"s1": "p1"} and found.labels["label"] == {"p1": "0"}
    _, found = read(foreign.put(tmp_path / "b.csv", f"slide_id,er,pr\n7,1,0\n{A}-01Z-00-DX1,0,\n"))
    assert found.labels == {"er": {"7": "1", A: "0"}, "pr": {"7": "0", A: ""}}
    assert found.notes == ("1 slide ids are no TCGA barcodes; each is a case of its own",)


def test_labels_of_slides_that_differ_within_a_case_need_by_slide(tmp_path):
    path = foreign.put(tmp_path / "c.csv", "case_id,slide_id,label\np0,s1,tumor\np0,s2,normal\n")
    with pytest.raises(DataError, match="line 3, column 'label': 'p0' is 'normal' here and 'tumor' before.*--by slide"):
        read(path)
    assert read(path, by="slide")[1].labels == {"label": {"s1": "tumor", "s2": "normal"}}
    _, found = read(path, conflicts="drop")
    assert found.labels == {"label": {"p0": ""}} and [item.name for item in found.left_out] == ["p0"]


def test_stamp_tables_and_splits(tmp_path):
    root = foreign.stamp(tmp_path)
    names = {"time_column": "days", "event_column": "status", "time_unit": "days"}
    layouts, found = read(root / "clini.csv", root / "slide.csv", root / "splits.json", **names)
    assert layouts == ["stamp"] * 3
    assert found.labels == {"isMSIH": {"p1": "MSIH", "p2": "nonMSIH", "p3": ""}}
    assert follow_up(found)["p1"] == (12.0, True) and np.isnan(follow_up(found)["p3"][0])
    assert found.slides == {"s1": "p1", "s2": "p1", "s3": "p2"} and found.notes == (
        "1 patients of the slide table have no file",
    )
    assert found.folds == {0: {"train": ("p1", "p3"), "test": ("p2",)}}
    _, plain = read(root / "clini.csv")
    assert plain.follow_up == {} and set(plain.labels) == {"isMSIH", "days", "status"}
    with pytest.raises(DataError, match="--time-column needs exactly one"):
        read(root / "clini.csv", time_column="days")


@pytest.mark.parametrize("shared", [True, False])
def test_excel_workbooks(tmp_path, shared):
    rows = [("PATIENT", "isMSIH", "", "grade"), ("p1", "MSIH", "", 2), ("p2", "", "", ""), ("", "", "", "")]
    layouts, found = read(foreign.workbook(tmp_path / "clini.xlsx", rows, shared=shared))
    assert layouts == ["stamp"] and found.labels == {"isMSIH": {"p1": "MSIH", "p2": ""}, "grade": {"p1": "2", "p2": ""}}
    (tmp_path / "broken.xlsx").write_bytes(b"PK no workbook")
    with pytest.raises(DataError, match="no readable Excel workbook"):
        read(tmp_path / "broken.xlsx")


def test_madeleine_availability_is_kept_as_such(tmp_path):
    text = ",slide_id,HE,HER2,PGR,KI67,ER,split\n0,s1,1,1,0,1,1,train\n1,s2,1,0,0,0,1,test\n"
    layouts, found = read(foreign.put(tmp_path / "acrobat.csv", text))
    assert layouts == ["madeleine"] and list(found.stains) == ["HE", "HER2", "PGR", "KI67", "ER"]
    assert found.stains["HER2"] == {"s1": True, "s2": False} and found.stains["PGR"] == {"s1": False, "s2": False}
    assert found.folds == {0: {"train": ("s1",), "test": ("s2",)}}
    with pytest.raises(DataError, match="line 2, column 'HER2': '' must be 1"):
        read(foreign.put(tmp_path / "bad.csv", "slide_id,HE,HER2\ns1,1,\n"), wanted="madeleine")


def test_cbioportal_takes_one_tumour_sample_per_patient(tmp_path):
    """TCGA rules: 01 before 06, 11 is normal, 03 is a tumour (blood), vial A before B."""
    layouts, found = read(foreign.cbioportal(tmp_path / "data_mrna_seq_v2_rsem_zscores_ref_all_samples.txt"))
    assert layouts == ["cbioportal"] and found.scale == "z-score"
    assert found.genes.case_id == (A, B, C) and found.genes.names == ("TP53_rnaseq", "ESR1_rnaseq")
    np.testing.assert_array_equal(found.genes.values, np.array([[1.5, np.nan], [-2.5, 3], [0.25, 1]], np.float32))
    reasons = {item.name: item.reason for item in found.left_out}
    assert reasons[f"{B}-11"] == "sample of normal tissue" and reasons["EMPTY"] == "no value in any sample"
    assert reasons[f"{A}-06"] == reasons[f"{C}-01B"] == "another sample of the patient is taken"
    assert reasons["TP53"] == "a later row of the same symbol" and "1 rows without a gene symbol" in found.notes[0]
    _, found = read(foreign.cbioportal(tmp_path / "zscores.txt"), sample_type=6)
    assert found.genes.case_id == (A,)
    with pytest.raises(DataError, match="--sample-type"):
        read(tmp_path / "zscores.txt", sample_type=9)


def test_cbioportal_copy_number_and_clinical_file(tmp_path):
    expression = foreign.cbioportal(tmp_path / "data_mrna_zscores.txt")
    number = foreign.cbioportal(tmp_path / "data_cna.txt", discrete=True)
    clinical = foreign.cbioportal_clinical(tmp_path / "data_clinical_patient.txt")
    _, found = read(expression, number, clinical)
    assert found.genes.names == ("TP53_rnaseq", "ESR1_rnaseq", "TP53_cnv", "MYC_cnv")
    np.testing.assert_array_equal(found.genes.values[:, 2:], [[-2, 1], [0, 2], [1, -1]])
    assert follow_up(found)[A] == (10.5, True) and follow_up(found)[B] == (20.0, False)
    assert np.isnan(follow_up(found)[C][0]) and follow_up(found, "dss")[A] == (10.5, False)
    assert found.labels == {"SEX": {A: "Female", B: "Male", C: "Female"}}
    text = clinical.read_text().replace("1:DECEASED", "2:GONE")
    with pytest.raises(DataError, match="line 6, column 'OS_STATUS': '2:GONE' is no status"):
        read(foreign.put(tmp_path / "bad.txt", text))


def test_plain_labels_with_follow_up_and_expression_with_case_ids(tmp_path):
    path = foreign.put(tmp_path / "l.csv", f"case_id;ER;time_months;event\n{A};1;3.5;1\n{B};;2;0\n")
    layouts, found = read(path)
    assert layouts == ["labels"] and found.labels == {"ER": {A: "1", B: ""}}
    assert follow_up(found) == {A: (3.5, True), B: (2.0, False)}
    genes = ",".join(f"G{i}" for i in range(20))
    text = f"case_id,{genes}\n{A}-01A,{','.join(['0.5'] * 20)}\n{A}-11A,{','.join(['9'] * 20)}\n"
    layouts, found = read(foreign.put(tmp_path / "e.csv", text))
    assert layouts == ["expression"] and found.genes.case_id == (A,) and found.genes.values[0, 0] == 0.5


def test_signatures_and_split_files(tmp_path):
    layouts, found = read(foreign.put(tmp_path / "signatures.csv", "Oncogenes,Kinases\nABL1,AAK1\nMYC,\n"))
    assert layouts == ["groups"] and found.groups == {"Oncogenes": ("ABL1", "MYC"), "Kinases": ("AAK1",)}
    for k in range(2):
        foreign.put(tmp_path / "splits" / f"splits_{k}.csv", f",train,val\n0,{A},{B}\n1,{C},\n")
    layouts, found = read(tmp_path / "splits")
    assert layouts == ["splits"] * 2 and found.folds[1] == {"train": (A, C), "val": (B,)}
    with pytest.raises(DataError, match="which fold this is must be in the name"):
        read(foreign.put(tmp_path / "mine.csv", f"train,val\n{A},{B}\n"))
    bools = foreign.put(tmp_path / "splits_0.csv", ",train,val,test\ns1,True,False,False\n")
    with pytest.raises(DataError, match="True and False, not ids"):
        read(bools)


BAD = {
    "unknown": ("a,b\n1,2\n", "no known table; its columns are"),
    "empty": ("", "the file is empty"),
    "empty id": ("case_id,slide_id,label\n,s1,0\n", "line 2: case_id is empty"),
    "doubled": ("case_id,slide_id,label,label\np,s,0,0\n", "'label' occurs 2 times"),
    "traversal": ("case_id,slide_id,label\n../p,s,0\n", "line 2, column 'case_id'.*without path separators"),
    "control": ("case_id,slide_id,label\np,s\x07,0\n", "line 2, column 'slide_id'"),
    "two cases": ("case_id,slide_id,label\np,s,0\nq,s,0\n", "line 3: slide 's' has case 'q' here and 'p' before"),
    "barcode": (f"case_id,slide_id,label\n{A},{B}-01Z,0\n", f"of patient '{B}' by its barcode and of case '{A}'"),
    "months": (f"case_id,slide_id,survival_months,censorship\n{A},s,soon,0\n", "'soon' is no follow-up in months"),
    "status": (f"case_id,slide_id,survival_months,censorship\n{A},s,1,2\n", "column 'censorship': '2' must be 0 or 1"),
    "conflict": (f"case_id,slide_id,survival_months,censorship\n{A},s,1,0\n{A},t,2,0\n", "needs one follow-up"),
    "not a number": (
        f"case_id,slide_id,survival_months,censorship,X_rnaseq\n{A},s,1,0,high\n",
        "line 2, column 'X_rnaseq': 'high' is no finite number",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_refused_with_file_line_and_column(tmp_path, name):
    text, message = BAD[name]
    with pytest.raises(DataError, match=message) as error:
        read(foreign.put(tmp_path / "bad.csv", text))
    assert "bad.csv" in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_bom_separators_leading_zeros_and_ids_beyond_ascii(tmp_path, encoding, separator):
    path = tmp_path / "clam.csv"
    text = "case_id,slide_id,label\n007,Schnitt.ä.1,1\n".replace(",", separator)
    path.write_text(text, encoding=encoding)
    _, found = read(path)
    assert found.slides == {"Schnitt.ä.1": "007"} and found.labels == {"label": {"007": "1"}}


def test_damaged_archives_and_missing_files_are_named(tmp_path):
    (tmp_path / "a.csv.zip").write_bytes(b"PK\x03\x04 damaged")
    (tmp_path / "a.csv.gz").write_bytes(b"no gzip")
    for name in ("a.csv.zip", "a.csv.gz"):
        with pytest.raises(DataError, match=f"{name}.*(archive|cannot be read)"):
            read(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "missing.csv")
    with pytest.raises(DataError, match="suffix is none of"):
        read(foreign.put(tmp_path / "t.pkl", "x"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="name the files"):
        read(tmp_path / "folder")


def test_files_that_contradict_one_another_are_refused(tmp_path):
    one = foreign.put(tmp_path / "one.csv", "case_id,ER\na,1\nb,\n")
    two = foreign.put(tmp_path / "two.csv", "case_id,ER,PR\na,0,1\n")
    with pytest.raises(DataError, match="label column 'ER': 'a' is '1' in one file and '0' in another"):
        read(one, two)
    two.write_text("case_id,ER,PR\nb,0,1\n")
    assert read(one, two)[1].labels == {"ER": {"a": "1", "b": "0"}, "PR": {"b": "1"}}
