"""`histokd validate` and `histokd splits`: joins, leakage, censoring, classes, features, exit codes, JSON."""

import json

import feature_folders as folders
import numpy as np
import pandas as pd
import pytest

from data_pipelines import sites
from data_pipelines.validate import features
from data_pipelines.writer import DatasetWriter

CASES = [f"TCGA-{site}-{i:04d}" for i, site in enumerate(["A1", "A2", "05", "E2", "BH", "C8"] * 8)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """48 cases of six sites, one slide each, but two of the first; labels and follow-up of all."""
    out = tmp_path_factory.mktemp("dataset") / "brca"
    slides = [(f"{case}-01Z-00-DX1", case) for case in CASES] + [(f"{CASES[0]}-01Z-00-DX2", CASES[0])]
    with DatasetWriter(out, name="brca", feat_dim=8) as writer:
        for i, (slide, case) in enumerate(slides):
            writer.add(slide, case, *folders.bag(i))
    return out


def table(**columns):
    time = np.random.default_rng(1).exponential(40, len(CASES)).round(2) + 0.1
    event = (time < np.random.default_rng(2).exponential(80, len(CASES))).astype(int)
    event[np.argsort(time)[-8:]] = 0
    base = {
        "case_id": CASES,
        "ER": [i % 2 for i in range(len(CASES))],
        "survival_months": time,
        "censorship": 1 - event,
    }
    return pd.DataFrame(base | columns)


@pytest.fixture
def write(tmp_path):
    def call(frame, name="table.csv", **options):
        frame.to_csv(tmp_path / name, index=False, **options)
        return tmp_path / name

    return call


def codes(shown, path):
    found = json.loads(path.read_text())
    assert found["ok"] == (shown.code == 0)
    return {(item["level"], item["code"]) for item in found["findings"]}


@pytest.fixture
def checked(histokd, dataset, tmp_path):
    """Runs the command; returns (output, codes of findings)."""

    def call(*arguments, data=dataset):
        shown = histokd("validate", data, *arguments, "--json", tmp_path / "report.json")
        assert shown.code in (0, 3), shown.err
        return shown, codes(shown, tmp_path / "report.json")

    return call


def test_good_data_set(checked, write, histokd, dataset, tmp_path):
    path = write(table())
    assert histokd("splits", dataset, "--out", tmp_path / "s", "--labels", path, "--task", "ER").code == 0
    shown, found = checked("--tables", path, "--task", "ER", "--splits", tmp_path / "s")
    assert shown.code == 0 and not {code for level, code in found if level != "note"}
    assert "49 slides of 48 cases" in shown.out and "ER: 0 24, 1 24" in shown.out
    assert "48 cases, 48 with slides, 0 without" in shown.out and "nothing is wrong" in shown.out
    facts = json.loads((tmp_path / "report.json").read_text())
    months = table()
    assert facts["tables"]["table.csv"]["survival"]["events"] == int((1 - months.censorship).sum())
    assert facts["tables"]["table.csv"]["survival"]["median_months"] == pytest.approx(months.survival_months.median())
    assert [sum(fold["cases"].values()) for fold in facts["folds"]] == [48] * 5


def test_unmatched_ids_are_listed_on_both_sides(checked, write, tmp_path):
    frame = pd.concat([table()[5:], table(case_id=[f"TCGA-ZZ-{i:04d}" for i in range(48)])[:3]])
    shown, found = checked("--tables", write(frame), "--task", "ER", "--quick")
    assert shown.code == 0 and {("note", "no_slides"), ("note", "not_listed")} <= found
    facts = json.loads((tmp_path / "report.json").read_text())["tables"]["table.csv"]
    assert facts["cases_without_slides"] == [f"TCGA-ZZ-{i:04d}" for i in range(3)]
    assert sorted(facts["cases_of_the_dataset_not_listed"]) == sorted(CASES[:5])


@pytest.mark.parametrize(
    ("alter", "hint"),
    [
        (str.lower, "upper and lower case"),
        (lambda case: f"{case}-01Z-00-DX1", "first 12 characters"),
        (lambda case: case.replace("-", "_"), "dashes and underscores"),
    ],
)
def test_tables_that_match_no_slide_are_an_error_with_the_likely_cause(checked, write, alter, hint):
    shown, found = checked("--tables", write(table(case_id=[alter(case) for case in CASES])), "--quick")
    assert shown.code == 3 and ("error", "no_match") in found and hint in shown.out


def test_lost_leading_zeros_of_ids_and_sites(histokd, checked, write, tmp_path):
    with DatasetWriter(tmp_path / "d", name="d", feat_dim=8) as writer:
        for i in range(3):
            writer.add(f"00{i + 1}", f"00{i + 1}", *folders.bag(i))
    frame = pd.DataFrame({"case_id": [1, 2, 3], "ER": [0, 1, 0]})
    shown, found = checked("--tables", write(frame), "--task", "ER", "--quick", data=tmp_path / "d")
    assert (
        "error",
        "no_match",
    ) in found and "3 would match if leading zeros were kept, e.g. '1' and '001'" in shown.out
    site = [case[5:7].lstrip("0") for case in CASES]
    shown, found = checked("--tables", write(table(site=site)), "--quick")
    assert ("note", "site_zeros") in found and "leading zero of 8 rows" in shown.out


def test_flipped_censoring_is_an_error(checked, write):
    frame = table()
    flipped = frame.assign(censorship=1 - frame.censorship)
    shown, found = checked("--tables", write(flipped), "--quick")
    assert shown.code == 3 and ("error", "censorship") in found
    shown, found = checked("--tables", write(flipped), "--quick", "--accept", "censorship")
    assert shown.code == 0 and ("warning", "censorship") in found and "(accepted)" in shown.out
    status = np.where(frame.censorship == 0, "Dead", "Alive")
    short = flipped.assign(vital_status=status)
    assert "vital_status" in checked("--tables", write(short), "--quick")[0].out


def test_cases_without_follow_up_and_without_events(checked, write):
    frame = table()
    frame.loc[:2, "survival_months"] = np.nan
    shown, found = checked("--tables", write(frame), "--quick")
    assert ("warning", "no_follow_up") in found and "3 cases have no follow-up" in shown.out
    shown, found = checked("--tables", write(table(censorship=1)), "--quick")
    assert shown.code == 3 and ("error", "no_events") in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ER": "maybe"}, "'maybe' is no label"),
        ({"ER": 1}, "classes are [1]"),
        ({"survival_months": -1.0}, "no follow-up in months"),
    ],
)
def test_bad_cells_are_errors_with_file_and_line(checked, write, change, message):
    shown, found = checked("--tables", write(table(**change)), "--task", "ER", "--quick")
    assert shown.code == 3 and ("error", "table") in found and message in shown.out


def test_label_outside_the_map(checked, write):
    frame = table(ER=["LUAD", "LUSC"] * 24)
    good, _ = checked("--tables", write(frame), "--task", "ER", "--label-map", "LUAD=0,LUSC=1", "--quick")
    assert good.code == 0 and "LUAD 24, LUSC 24" in good.out
    frame.loc[7, "ER"] = "MESO"
    shown, _ = checked("--tables", write(frame), "--task", "ER", "--label-map", "LUAD=0,LUSC=1", "--quick")
    assert shown.code == 3 and "line 9" in shown.out and "'MESO' is not in the label map" in shown.out


def test_missing_task_and_empty_class(checked, write):
    shown, found = checked("--tables", write(table()), "--task", "PR", "--quick")
    assert shown.code == 3 and ("error", "task") in found
    frame = pd.concat([table(ER=0), pd.DataFrame({"case_id": ["GHOST"], "ER": [1]})])
    shown, found = checked("--tables", write(frame[["case_id", "ER"]]), "--task", "ER", "--quick")
    assert shown.code == 3 and ("error", "empty_class") in found


def test_semicolons_bom_and_doubled_columns(checked, write, tmp_path):
    shown, _ = checked("--tables", write(table(), sep=";", encoding="utf-8-sig"), "--task", "ER", "--quick")
    assert shown.code == 0 and "ER: 0 24, 1 24" in shown.out
    lines = ["case_id,ER,ER", *(f"{case},0,1" for case in CASES)]
    (tmp_path / "twice.csv").write_text("\n".join(lines))
    shown, found = checked("--tables", tmp_path / "twice.csv", "--task", "ER", "--quick")
    assert shown.code == 3 and "column 'ER' occurs 2 times" in shown.out


def write_split(path, **parts):
    path.parent.mkdir(exist_ok=True)
    pd.DataFrame({name: pd.Series(ids, dtype=object) for name, ids in parts.items()}).to_csv(path)
    return path


def test_leaking_split_by_case_and_by_slide(checked, write, tmp_path):
    path = write(table())
    same = write_split(tmp_path / "a" / "splits_0.csv", train=CASES[:30], val=CASES[29:])
    shown, found = checked("--tables", path, "--splits", same.parent, "--quick")
    assert shown.code == 3 and ("error", "split") in found and CASES[29] in shown.out
    slides = [f"{case}-01Z-00-DX1" for case in CASES]
    other = [*slides[1:20], f"{CASES[0]}-01Z-00-DX2"]
    leak = write_split(tmp_path / "b" / "splits_0.csv", train=other, val=slides[20:30], test=[slides[0], *slides[30:]])
    shown, found = checked("--tables", path, "--splits", leak.parent, "--quick")
    assert shown.code == 3 and ("error", "patient_leak") in found and CASES[0] in shown.out
    shown, found = checked("--tables", path, "--splits", leak.parent, "--quick", "--accept", "patient_leak")
    assert shown.code == 0 and ("warning", "patient_leak") in found


def test_site_overlap_classes_and_events_per_fold(checked, write, tmp_path):
    frame = table()
    order = frame.sort_values("ER").case_id.tolist()
    one = write_split(tmp_path / "a" / "splits_0.csv", train=order[:24], val=order[24:34], test=order[34:])
    shown, found = checked("--tables", write(frame), "--task", "ER", "--splits", one.parent, "--quick")
    assert shown.code == 3 and {("error", "fold_class"), ("note", "site_overlap")} <= found
    assert "train has no case of class 1" in shown.out
    fold = json.loads((tmp_path / "report.json").read_text())["folds"][0]
    events = dict(zip(frame.case_id, 1 - frame.censorship))
    assert fold["events"]["test"] == sum(events[case] for case in order[34:])
    assert fold["classes"]["val"] == {"0": 0, "1": 10}


def test_features_statistics_against_numpy(dataset, checked, tmp_path):
    from data_pipelines.reader import BagReader

    reader = BagReader(dataset)
    whole = np.concatenate([reader.read_bag(i)[0] for i in range(49)]).astype(np.float64)
    checked()
    facts = json.loads((tmp_path / "report.json").read_text())["features"]
    assert facts["mean"] == pytest.approx(whole.mean()) and facts["std"] == pytest.approx(whole.std(0).mean())
    assert (facts["smallest"], facts["largest"]) == (whole.min(), whole.max())


def test_constant_saturated_duplicate_and_odd_features(checked, tmp_path):
    features, coords = folders.bag(0, n=20)
    features[:, 3] = 1
    with DatasetWriter(tmp_path / "d", name="d", feat_dim=8) as writer:
        writer.add("a", "P1", features, coords)
        writer.add("b", "P2", features[::-1], coords)
        for i in range(4):
            more = folders.bag(i + 1, n=20)[0]
            more[:, 3] = 1
            writer.add(f"c{i}", f"Q{i}", more, coords)
        twin = folders.bag(1, n=20)[0]
        twin[:, 3] = 1
        writer.add("d", "Q0", twin, coords)
        large = folders.bag(9, n=20)[0] * 2000
        large[:, 3], large[0, 0] = 1, 65504
        writer.add("e", "R", large, coords)
    shown, found = checked(data=tmp_path / "d")
    assert shown.code == 3
    expected = {("error", "duplicates"), ("warning", "duplicates"), ("warning", "constant"), ("warning", "saturation")}
    assert expected | {("warning", "scale")} <= found
    facts = json.loads((tmp_path / "report.json").read_text())["features"]
    assert facts["constant_dimensions"] == [3] and facts["saturated_values"] == 1
    assert sorted(map(sorted, facts["duplicates"])) == [["a", "b"], ["c0", "d"]]


def test_digest_ignores_order_but_no_content():
    bag = folders.bag(0, n=50)[0].astype(np.float16)
    digest = features.content_digest(bag)
    assert digest == features.content_digest(bag[np.random.default_rng(0).permutation(50)])
    changed, swapped = bag.copy(), bag.copy()
    changed[7, 2] += 1
    swapped[[3, 4], 0] = swapped[[4, 3], 0]
    assert len({digest, *(features.content_digest(x) for x in (changed, swapped, bag[:-1], bag[:, ::-1]))}) == 5


def test_damaged_shard_is_a_finding_and_a_missing_data_set_an_error(checked, histokd, tmp_path):
    with DatasetWriter(tmp_path / "d", name="d", feat_dim=8) as writer:
        writer.add("a", "P1", *folders.bag(0))
    path = next((tmp_path / "d").glob("*array_record*"))
    content = bytearray(path.read_bytes())
    content[content.index(b"patches") + 60] ^= 1
    path.write_bytes(content)
    assert ("error", "shard") in checked("--checksums", "--quick", data=tmp_path / "d")[1]
    assert ("error", "shard") in checked(data=tmp_path / "d")[1]
    shown = histokd("validate", tmp_path / "nowhere")
    assert shown.code == 1 and "manifest.json does not exist" in shown.err


# --- histokd splits


def read_splits(path):
    return [pd.read_csv(file, dtype=str).fillna("") for file in sorted(path.glob("splits_*.csv"))]


def members(fold):
    return {part: set(fold[part]) - {""} for part in ("train", "val", "test")}


def test_splits_are_balanced_and_patients_whole(histokd, dataset, write, tmp_path):
    arguments = ("splits", dataset, "--out", tmp_path / "s", "--survival", write(table()))
    shown = histokd(*arguments)
    assert shown.code == 0 and "5 folds of 48 cases" in shown.out, shown.err
    folds = [members(fold) for fold in read_splits(tmp_path / "s")]
    assert set.union(*(fold["test"] for fold in folds)) == set(CASES)
    frame = table().set_index("case_id")
    events = [int((1 - frame.censorship[list(fold["test"])]).sum()) for fold in folds]
    assert max(events) - min(events) <= 1
    assert histokd(*arguments).code == 1 and histokd(*arguments, "--overwrite").code == 0


def test_site_preserved_splits_share_no_site_between_test_and_the_rest(histokd, dataset, write, tmp_path):
    arguments = ("--labels", write(table()), "--task", "ER", "--site-preserved", "--folds", 3)
    assert histokd("splits", dataset, "--out", tmp_path / "s", *arguments).code == 0
    for fold in map(members, read_splits(tmp_path / "s")):
        site = {part: {case[5:7] for case in ids} for part, ids in fold.items()}
        assert len(fold["test"]) == 16 and not site["test"] & (site["train"] | site["val"])
    shown = histokd("splits", dataset, "--out", tmp_path / "t", *arguments[:-1], 7)
    assert shown.code == 1 and "the cohort has 6 sites" in shown.err


def test_sites_from_a_table(histokd, tmp_path):
    with DatasetWriter(tmp_path / "d", name="d", feat_dim=8) as writer:
        for i in range(12):
            writer.add(f"s{i}", f"p{i}", *folders.bag(i))
    arguments = (
        "splits",
        tmp_path / "d",
        "--out",
        tmp_path / "s",
        "--site-preserved",
        "--folds=2",
        "--val-fraction=0.4",
    )
    assert "12 of 12 cases have no known site" in histokd(*arguments).err
    (tmp_path / "t.csv").write_text("case_id,site\n" + "".join(f"p{i},{'abc'[i % 3]}\n" for i in range(12)))
    assert histokd(*arguments, "--sites", tmp_path / "t.csv").code == 0


def test_sites_of_barcodes_keep_their_leading_zero():
    assert sites.tissue_source_site("TCGA-05-4244-01Z-00-DX1") == "05"
    assert sites.tissue_source_site("P-0000674") is None and sites.tissue_source_site("TCGA-05-42441") is None


@pytest.mark.real_data
def test_published_tables_and_splits(real_data, checked, tmp_path):
    """Golden: BRCA of PORPOISE has 130 events of 956 cases; SurvPath's folds share no site, PORPOISE's many."""
    root = real_data / "tcga_genomics" / "porpoise"
    path = root / "datasets_csv_mutsig" / "tcga_brca_all_clean.csv.zip"
    cases = pd.read_csv(path, usecols=["case_id", "slide_id"], low_memory=False)
    with DatasetWriter(tmp_path / "d", name="brca", feat_dim=2) as writer:
        for slide, case in zip(cases.slide_id, cases.case_id):
            writer.add(slide.removesuffix(".svs"), case, np.ones((1, 2), np.float32))
    folder = root / "splits" / "5foldcv" / "tcga_brca"
    shown, found = checked("--tables", path, "--splits", folder, "--quick", data=tmp_path / "d")
    facts = json.loads((tmp_path / "report.json").read_text())
    assert shown.code == 0 and facts["tables"][path.name]["survival"]["events"] == 130
    assert facts["tables"][path.name]["cases_matched"] == 956
    assert all(len(fold["sites_shared_with_test"]) >= 9 for fold in facts["folds"])
    other = real_data / "tcga_genomics" / "survpath" / "splits" / "5foldcv" / "tcga_brca"
    checked("--tables", path, "--splits", other, "--quick", data=tmp_path / "d")
    facts = json.loads((tmp_path / "report.json").read_text())
    assert [fold["sites_shared_with_test"] for fold in facts["folds"]] == [[]] * 5
