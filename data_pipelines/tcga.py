"""TCGA barcodes `TCGA-TSS-PART-SSV-...`: patient, tissue source site and sample type. A leaf module."""

from __future__ import annotations

import re
from typing import NamedTuple

_BARCODE = re.compile(
    r"(?P<patient>TCGA-(?P<site>[A-Z0-9]{2})-[A-Z0-9]{4})(?:-(?P<type>\d{2})(?P<vial>[A-Z])?)?(?![A-Za-z0-9])"
)
TUMOUR_TYPES = range(1, 10)
"""Sample types of tumour tissue: 01 primary, 02 recurrent, 06 metastasis, ...; 10-19 are normal, 20-29 controls."""
PRIMARY = 1


class Barcode(NamedTuple):
    """The leading parts of a barcode.

    Attributes:
      patient: first 12 characters.
      site: tissue source site, two characters; may begin with 0.
      sample_type: 1 to 29, or None if the id ends after the patient or goes on in another way.
      vial: letter behind the sample type, or "".
    """

    patient: str
    site: str
    sample_type: int | None = None
    vial: str = ""


def parse(identifier: str) -> Barcode | None:
    """The barcode at the start of an id; None if there is none."""
    match = _BARCODE.match(identifier)
    if match is None:
        return None
    kind = match["type"]
    return Barcode(match["patient"], match["site"], None if kind is None else int(kind), match["vial"] or "")


def patient_of(identifier: str) -> str | None:
    """First 12 characters of a barcode; None for any other id."""
    found = parse(identifier)
    return found and found.patient
