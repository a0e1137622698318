"""Every real table goes through `histokd tables`, with the counts of the inventory beside it; nothing is overlooked."""

import csv
import fnmatch
import json

import numpy as np
import pytest

from data_pipelines import tables
from data_pipelines.errors import DataError
from data_pipelines.table_sources import detect, write
from data_pipelines.table_sources.contents import Options

FOLDERS = ("tcga_genomics", "tcga_brca_ihc", "feature_bags")
TABLES = ("tcga_genomics/*.zip", "tcga_genomics/survpath/datasets_csv/*.gz", "tcga_brca_ihc/labels.csv")
SIGNATURES, SPLITS = "tcga_genomics/*/signatures.csv", "tcga_genomics/*/splits/5foldcv/*/splits_*.csv"
ELSEWHERE = {
    "feature_bags/mopadi/*.h5": "histokd import, tests/data_pipelines/importers/test_faults.py",
    "feature_bags/glioma_cell_graphs/cells/*.npz": "histokd import, the same test",
    "feature_bags/links.csv": "a table of slides and cases, read here",
    "feature_bags/glioma_cell_graphs/imgs/*": "pictures of the regions",
    "feature_bags/mopadi/*.jpg": "pictures of three tiles",
    "*README.md": "a description",
    "tcga_genomics/INVENTORY.csv": "the counts that these tests compare with",
}
PUBLISHED = [
    "mcat/datasets_csv_sig/tcga_ucec",
    "porpoise/datasets_csv_mutsig/tcga_paad",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            *("mcat/dataset_csv/tcga_ucec", "mcat/datasets_csv_sig/tcga_blca"),
            *(f"porpoise/datasets_csv_mutsig/tcga_{name}" for name in ("blca", "brca", "coadread", "gbmlgg")),
            *(f"porpoise/datasets_csv_mutsig/tcga_{name}" for name in ("kirp", "ucec")),
        )
    ),
]

pytestmark = pytest.mark.real_data


def through(out, *paths, options=None, **request):
    options = options or Options()
    return write.write_tables(detect.read_all(paths, options), out, options, write.Request(**request))


@pytest.fixture(scope="session")
def inventory(real_data):
    with open(real_data / "tcga_genomics" / "INVENTORY.csv", newline="") as file:
        return {row["file"].split(" ")[0]: {k: v for k, v in row.items()} for row in csv.DictReader(file)}


def test_every_file_is_accounted_for(real_data):
    patterns = (*TABLES, SIGNATURES, SPLITS, *ELSEWHERE)
    files = [path for folder in FOLDERS for path in (real_data / folder).rglob("*") if path.is_file()]
    names = [path.relative_to(real_data).as_posix() for path in files]
    assert len(names) > 100
    assert [name for name in names if not any(fnmatch.fnmatch(name, p) for p in patterns)] == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_mcat_and_porpoise_tables_have_the_counts_of_the_inventory(real_data, inventory, tmp_path, name):
    file = f"{name}_all_clean.csv.zip"
    done = through(tmp_path / "out", real_data / "tcga_genomics" / file)
    known = {key: int(value) for key, value in inventory[file].items() if value.isdecimal()}
    account = done.account
    assert account["sources"][0]["layout"] == "mcat"
    assert (account["cases"]["n"], account["cases"]["slides"]) == (known["patients"], known["slides"])
    columns = account["tables"]["genes.npz"]["columns"]
    assert columns.get("rnaseq", 0) == known["rnaseq"] and columns.get("cnv", 0) == known["cnv"]
    assert columns.get("mut", 0) == known["mut_suffix"] + known["unsuffixed_gene"]
    assert account["tables"]["survival.csv"]["os"]["events"] == known["events"]
    assert account["cases"]["not_tcga"] == [] and account["tables"]["genes.npz"]["missing_values"] == 0
    assert not [text for text in account["warnings"] if "swapped" in text]
    stored = tables.read_gene_npz(tmp_path / "out" / "genes.npz")
    assert stored.values.shape == (known["patients"], sum(columns.values())) and np.isfinite(stored.values).all()


def test_wild_values_of_blca_are_found_and_clipped(real_data, tmp_path):
    path = real_data / "tcga_genomics" / "porpoise" / "datasets_csv_mutsig" / "tcga_blca_all_clean.csv.zip"
    done = through(tmp_path / "out", path, only=("genes",), outliers="clip")
    facts = done.account["tables"]["genes.npz"]["outliers"]
    assert round(facts["largest"]) == 14071 and facts["largest_gene"] == "AMELX_rnaseq"
    assert tables.read_gene_table(tmp_path / "out" / "genes.npz").values.max() == 10
    assert round(float(tables.read_gene_table(tmp_path / "out" / "genes_exact.npz").values.max())) == 14071


@pytest.mark.parametrize(
    "study, rna, dss",
    [("blca", 359, 113), pytest.param("coadread", 296, 37, marks=pytest.mark.slow), ("brca", None, 60)],
)
def test_survpath_folder(real_data, tmp_path, study, rna, dss):
    """Golden: disease-specific events and patients with expression of the README and the published description."""
    root = real_data / "tcga_genomics" / "survpath"
    options = Options(study=study, conflicts="drop")
    if study != "blca":
        with pytest.raises(DataError, match="clinical.csv.gz, line .*column 'subtype'.*--conflicts drop"):
            detect.read_all([root / "datasets_csv"], Options(study=study))
    done = through(tmp_path / "out", root / "datasets_csv", options=options, endpoint="dss")
    account = done.account
    assert account["tables"]["survival.csv"]["dss"]["events"] == dss
    subtypes = account["tables"]["labels.csv"]["columns"]["subtype"]
    dropped = sum(item["n"] for item in account["left_out"] if item["what"] == "label")
    assert dropped == {"blca": 0, "brca": 7, "coadread": 4}[study] and subtypes["not_available"] >= dropped
    patients = {"blca": 359, "brca": 871, "coadread": 298}[study]
    assert sum(account["tables"]["survival.csv"]["os"][k] for k in ("cases", "without_follow_up")) == patients
    folds = detect.read_all([root / "splits" / "5foldcv" / f"tcga_{study}"], options)
    val = {case for item in folds for parts in item.contents.folds.values() for case in parts["val"]}
    if rna is None:
        assert "genes.npz" not in done.files and "groups/signatures.csv" not in done.files
        return
    genes = tables.read_gene_table(tmp_path / "out" / "genes.npz")
    assert len(set(genes.case_id) & val) == rna and len(genes.names) == 1577
    assert account["tables"]["genes.npz"]["scale"] == "log" and len(account["tables"]["groups/signatures.csv"]) == 281
    if study == "coadread":
        assert any(not case.startswith("TCGA-") for case in account["cases"]["not_tcga"])


@pytest.mark.parametrize(
    "pattern, count, groups",
    [
        ("*/signatures.csv", 2, 6),
        ("*/signatures.csv.gz", 1, 6),
        ("*/hallmarks_*", 2, 50),
        ("*/xena_*", 2, 281),
        ("*/combine_*", 2, 331),
    ],
)
def test_gene_groups_have_the_published_numbers(real_data, tmp_path, pattern, count, groups):
    root = real_data / "tcga_genomics"
    paths = sorted(p for p in root.rglob("*.csv*") if fnmatch.fnmatch(p.as_posix(), pattern))
    if pattern == "*/signatures.csv":
        paths = [p for p in paths if p.suffix == ".csv"]
    assert len(paths) == count
    for path in paths:
        (found,) = detect.read_all([path], Options())
        assert found.layout == "groups" and len(found.contents.groups) == groups, path


def test_split_folders_go_through_unchanged_and_partition_their_cohort(real_data, tmp_path):
    folders = sorted({path.parent for path in (real_data / "tcga_genomics").rglob("splits_0.csv")})
    assert len(folders) == 14
    for folder in folders:
        out = tmp_path / folder.parts[-4] / folder.name
        done = through(out, folder)
        facts = done.account["tables"]["splits"]
        assert len(facts) == 5 and len({parts["train"] + parts["val"] for parts in facts.values()}) == 1
        with open(folder / "splits_0.csv", newline="") as file, open(out / "splits" / "splits_0.csv") as written:
            for before, after in zip(csv.DictReader(file), csv.DictReader(written), strict=True):
                assert (before["train"], before["val"]) == (after["train"], after["val"])


def test_ihc_labels_and_links(real_data, tmp_path):
    done = through(tmp_path / "ihc", real_data / "tcga_brca_ihc" / "labels.csv")
    columns = done.account["tables"]["labels.csv"]["columns"]
    golden = {"ER": (554, 165), "PR": (484, 232), "HER2": (103, 602)}
    assert {name: (facts["values"]["1"], facts["values"]["0"]) for name, facts in columns.items()} == golden
    assert done.account["cases"]["n"] == 750
    text = (tmp_path / "ihc" / "account-labels.json").read_text()
    assert json.loads(text)["sources"][0]["layout"] == "labels" and str(real_data) not in text
    (found,) = detect.read_all([real_data / "feature_bags" / "links.csv"], Options())
    assert found.layout == "labels" and len(found.contents.cases()) == 3
