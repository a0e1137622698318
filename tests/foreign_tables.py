"""Foreign tables as their projects write them, made by the tests from the published descriptions of their columns."""

import gzip
import io
import json
import zipfile

A, B, C = "TCGA-A1-0001", "TCGA-05-0002", "TCGA-BH-0003"
SLIDES = ((A, f"{A}-01Z-00-DX1.aa"), (A, f"{A}-01Z-00-DX2.ab"), (B, f"{B}-01Z-00-DX1.ba"), (C, f"{C}-01Z-00-DX1.ca"))


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def mcat(path, *, order="porpoise", extra=""):
    """Zipped as published, with a relative path inside; PORPOISE's or MCAT's order of columns."""
    facts = {A: ("63", "A1", "0", "IDC", "10.5", "0", "1.0"), B: ("", "5", "", "ILC", "20.0", "1", "0.0")}
    facts[C] = ("71.0", "BH", "1", "IDC", "3.25", "1", "1.0")
    genes = {A: ("0.5", "36893.2", "-1", "1"), B: ("-0.25", "1.5", "2", "0"), C: ("0.125", "-2.5", "0", "0")}
    names = ["age", "site", "is_female", "oncotree_code", "survival_months", "censorship", "train"]
    columns = list(range(7)) if order == "porpoise" else [1, 2, 3, 0, 4, 5, 6]
    header = ["", "case_id", "slide_id", *(names[i] for i in columns)]
    header += ["TP53_rnaseq", "FGF4_rnaseq", "MYC_cnv", f"KRAS{'' if extra == 'bare' else '_mut'}"]
    lines = [",".join(header)]
    for row, (case, slide) in enumerate(SLIDES):
        cells = [str(row), case, f"{slide}.svs", *(facts[case][i] for i in columns), *genes[case]]
        lines.append(",".join(cells))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("../dataset_csv/tcga_toy_all_clean.csv.zip", "\n".join(lines) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.getvalue())
    return path


def survpath(root, studies=("toy",), collections=("xena",), genes=24):
    """A folder datasets_csv: metadata, clinical data, expression, memberships; a patient without expression."""
    for study in studies:
        header = "case_id,slide_id,age,site,survival_months,survival_months_dss,survival_months_pfi,censorship,"
        header += "censorship_dss,censorship_pfi,is_female,oncotree_code,train"
        times = {A: "10.5,10.5,4.0,0,1,0", B: "20,20,20,1,1,1", C: "3.25,,3.0,1,,0"}
        lines = [f",{header}"]
        for row, (case, slide) in enumerate(SLIDES):
            lines.append(f"{row},{case},{slide}.svs,60,{case[5:7].lstrip('0')},{times[case]},1,IDC,1.0")
        packed(root / "metadata" / f"tcga_{study}.csv.gz", "\n".join(lines) + "\n")
        clinical = f",case_id,stage,subtype,grade\n0,{A},II,IDC,N/A\n1,P-0000674,N/A,ILC,G2\n"
        packed(root / "clinical_data" / f"tcga_{study}_clinical.csv.gz", clinical)
        for name in collections:
            symbols = [f"G{i}" for i in range(genes)]
            lines = [f",{','.join(symbols)}"]
            lines += [f"{case},-9.9658,{','.join(str(i / 4) for i in range(1, genes))}" for case in (C, A)]
            packed(root / "raw_rna_data" / name / study / "rna_clean.csv.gz", "\n".join(lines) + "\n")
    for name, first in zip(collections, ("", "gene")):
        memberships = f"{first},PATH_A,PATH_B\nG0,1,0\nG1,1,1\nG9,0,0\n"
        packed(root / "pathway_compositions" / f"{name}_comps.csv.gz", memberships)
    return root


def packed(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()))
    return path


def mmp(root, study="TCGA_BRCA_overall_survival", folds=2):
    cases = (A, B, C)
    days = {A: "365.25,0,100,1", B: "730.5,1,,", C: "30,0,30,0"}
    for fold in range(folds):
        parts = {"test": (cases[fold],), "train": tuple(c for i, c in enumerate(cases) if i != fold)}
        for part, ids in parts.items():
            lines = [",case_id,slide_id,os_survival_days,os_censorship,dss_survival_days,dss_censorship,project_id"]
            lines += [f"0,{case},{slide},{days[case]},TCGA" for case, slide in SLIDES if case in ids]
            put(root / f"{study}_k={fold}" / f"{part}.csv", "\n".join(lines) + "\n")
    return root


def patho_bench(path):
    fold = {A: "train\ttest", B: "val\ttrain", C: "test\ttrain"}
    lines = ["case_id\tslide_id\tstatus\tfold_0\tfold_1"]
    lines += [f"{case}\t{slide}\t{'pos' if case == A else 'neg'}\t{fold[case]}" for case, slide in SLIDES]
    return put(path, "\n".join(lines) + "\n")


def cbioportal(path, *, discrete=False):
    samples = [f"{A}-01", f"{A}-06", f"{B}-11", f"{B}-03", f"{C}-01B", f"{C}-01A"]
    rows = {"TP53": "1.5 9 9 -2.5 8 0.25", "ESR1": "NA 9 9 3 8 1", "TP53 ": "7 7 7 7 7 7", "": "1 1 1 1 1 1"}
    rows["EMPTY"] = "NA NA NA NA NA NA"
    if discrete:
        rows = {"TP53": "-2 2 2 0 2 1", "MYC": "1 2 2 2 2 -1"}
    lines = ["\t".join(("Hugo_Symbol", "Entrez_Gene_Id", *samples))]
    lines += ["\t".join((name, "1", *values.split())) for name, values in rows.items()]
    return put(path, "\n".join(lines) + "\n")


def cbioportal_clinical(path):
    comments = "#Patient Identifier\tOverall Survival\n#Id of a patient\tText\n#STRING\tSTRING\n#1\t1\n"
    header = "PATIENT_ID\tOS_STATUS\tOS_MONTHS\tDSS_STATUS\tDSS_MONTHS\tSEX\n"
    rows = [f"{A}\t1:DECEASED\t10.5\t0:ALIVE OR DEAD TUMOR FREE\t10.5\tFemale", f"{B}\t0:LIVING\t20\t\t\tMale"]
    return put(path, comments + header + "\n".join([*rows, f"{C}\t[Not Available]\t\t\t\tFemale"]) + "\n")


def stamp(root):
    put(root / "clini.csv", "PATIENT,isMSIH,days,status\np1,MSIH,365.25,1\np2,nonMSIH,30,0\np3,,,\n")
    put(root / "slide.csv", "PATIENT,FILENAME\np1,sub/s1.h5\np1,s2.h5\np2,s3.h5\np3,\n")
    folds = [{"train_patients": ["p1", "p3"], "test_patients": ["p2"]}]
    put(root / "splits.json", json.dumps({"splits": folds}))
    return root


def workbook(path, rows, *, shared=True):
    """An Excel file of one sheet with empty cells left out, as Excel does."""
    strings = []

    def cell(value, column, row):
        place = f"{chr(ord('A') + column)}{row}"
        if isinstance(value, (int, float)):
            return f'<c r="{place}"><v>{value}</v></c>'
        if not shared:
            return f'<c r="{place}" t="inlineStr"><is><t>{value}</t></is></c>'
        strings.append(value)
        return f'<c r="{place}" t="s"><v>{len(strings) - 1}</v></c>'

    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    lines = [
        f'<row r="{r}">{"".join(cell(v, c, r) for c, v in enumerate(row) if v != "")}</row>'
        for r, row in enumerate(rows, 1)
    ]
    sheet = f"<worksheet {space}><sheetData>{''.join(lines)}</sheetData></worksheet>"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", sheet)
        if shared:
            items = "".join(f"<si><t>{text}</t></si>" for text in strings)
            archive.writestr("xl/sharedStrings.xml", f"<sst {space}>{items}</sst>")
    return path
