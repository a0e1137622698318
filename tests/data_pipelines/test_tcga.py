"""TCGA barcodes against slices written by hand."""

import pytest

from data_pipelines import tcga


@pytest.mark.parametrize(
    "text, expected",
    [
        ("TCGA-02-0001-01Z-00-DX1.4755D138-5842-4159", ("TCGA-02-0001", "02", 1, "Z")),
        ("TCGA-A2-A0T2-01A-01-TS1", ("TCGA-A2-A0T2", "A2", 1, "A")),
        ("TCGA-EE-A2GJ-06", ("TCGA-EE-A2GJ", "EE", 6, "")),
        ("TCGA-EE-A2GJ-11A-11D", ("TCGA-EE-A2GJ", "EE", 11, "A")),
        ("TCGA-EE-A2GJ", ("TCGA-EE-A2GJ", "EE", None, "")),
        ("TCGA-EE-A2GJ.uuid", ("TCGA-EE-A2GJ", "EE", None, "")),
    ],
)
def test_parts_equal_the_slices_of_the_barcode(text, expected):
    found = tcga.parse(text)
    assert found == expected
    assert found.patient == text[:12] and found.site == text[5:7]
    if found.sample_type is not None:
        assert f"{found.sample_type:02d}" == text[13:15] and found.vial == text[15:16]


@pytest.mark.parametrize("text", ["P-0000674", "TCGA-05-42441", "tcga-05-4244", "TCGA-05-4244A", "x TCGA-05-4244", ""])
def test_other_ids_are_no_barcodes(text):
    assert tcga.parse(text) is None and tcga.patient_of(text) is None
