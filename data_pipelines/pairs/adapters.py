"""Sources of image pairs: BCI, MIST, plain folders, a table, and folders of single images.

folder   ROOT/{train,val,test}/{HE,IHC}/NAME, or ROOT/{HE,IHC}/NAME; other names of the two folders can be given
bci      the same, or ROOT/{HE,IHC}/{train,test}/NAME as downloaded; flat folders get their split from the names
mist     ROOT/TrainValAB/{trainA,trainB,valA,valB}/NAME: A is H&E; val is what its authors report, so it becomes test
table    a CSV with he_path, ihc_path, label, group, split (and he_box, ihc_box: "left top right bottom"); only he_path
         is needed; paths are relative to the table
images   single images below ROOT, with labels.csv (file, label, group) if there is one; no partners
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

from data_pipelines.errors import DataError
from data_pipelines.pairs.listing import (
    MISSING_PARTNER,
    ORPHAN,
    SPLITS,
    Box,
    Listed,
    Listing,
    check_splits,
    images_in,
    match_partners,
    stem,
    with_ids,
)
from data_pipelines.planned_writer import Rejected
from data_pipelines.text_table import BLANK, read_text_table

IMAGE_FOLDERS, PARTNER_FOLDERS = ("HE", "H&E", "he"), ("IHC", "ihc")
LABELS_FILE = "labels.csv"
BCI_NAME = re.compile(r"^\d+_(train|test)_(?:0|1\+|2\+|3\+)\.")
BCI, MIST, FOLDER, TABLE, IMAGES, AUTO = "bci", "mist", "folder", "table", "images", "auto"
KEEP, QUARANTINE, REFUSE = "keep", "quarantine", "refuse"
MISSING_POLICIES = (QUARANTINE, REFUSE, KEEP)


def list_pairs(
    source: pathlib.Path,
    layout: str = AUTO,
    *,
    image_folder: str = "",
    partner_folder: str = "",
    missing_partner: str = QUARANTINE,
) -> Listing:
    """Lists the examples of a source.

    Args:
      source: folder or table.
      layout: one of the adapters above, or "auto".
      image_folder: name of the folders of H&E images; default: HE.
      partner_folder: name of the folders of partners; default: IHC.
      missing_partner: examples without a partner where others have one: "quarantine", "refuse", or "keep" (they train
        with `has_partner` False).

    Returns:
      The listing; no image is opened.

    Raises:
      DataError: nothing is found, or it contradicts itself.
    """
    if missing_partner not in MISSING_POLICIES:
        raise DataError(f"--missing-partner {missing_partner}: choose one of {MISSING_POLICIES}")
    if not source.exists():
        raise DataError(f"{source} does not exist: give a folder of images or a table")
    chosen, evidence = detect(source, image_folder) if layout == AUTO else (layout, ("as given",))
    names = (image_folder, partner_folder)
    adapters: Mapping[str, Callable[[], tuple[list[Listed], list[Rejected], bool]]] = {
        BCI: lambda: _folder(source, names, from_names=True),
        FOLDER: lambda: _folder(source, names),
        MIST: lambda: _mist(source),
        TABLE: lambda: _table(source),
        IMAGES: lambda: _images(source),
    }
    if chosen not in adapters:
        raise DataError(f"--format {chosen} is unknown; choose one of {AUTO}, {', '.join(adapters)}")
    examples, rejected, has_partners = adapters[chosen]()
    root = source.parent if chosen == TABLE else source
    if has_partners:
        examples, missing = _without_partner(examples, missing_partner, root)
        rejected += missing
    if not examples:
        raise DataError(f"{source}: no {'image pair' if has_partners else 'image'} was found in layout {chosen!r}")
    check_splits([example.split for example in examples], str(source))
    return Listing(chosen, root, with_ids(examples), tuple(rejected), has_partners, tuple(evidence))


def detect(source: pathlib.Path, image_folder: str = "") -> tuple[str, tuple[str, ...]]:
    """Recognises the layout of a source.

    Returns:
      (layout, evidence).

    Raises:
      DataError: none fits.
    """
    if source.is_file():
        return TABLE, (f"{source.name} is a file",)
    if _mist_root(source) is not None:
        return MIST, ("folder trainA",)
    folders = _pair_folders(source, (image_folder, ""))
    if folders:
        names = [name for _, image, _ in folders for name in images_in(image)[:50]]
        if names and all(BCI_NAME.match(name) for name in names):
            return BCI, (f"folder {folders[0][1].name}, names like {names[0]}",)
        return FOLDER, (f"folder {folders[0][1].relative_to(source).as_posix()}",)
    if (source / LABELS_FILE).is_file() or images_in(source, deep=True):
        return IMAGES, (LABELS_FILE if (source / LABELS_FILE).is_file() else "images without partners",)
    raise DataError(
        f"{source}: no known layout of image pairs (no folder {IMAGE_FOLDERS[0]}, no trainA, no {LABELS_FILE}, no "
        "images); give --format, --image-folder and --partner-folder, or a table with he_path and ihc_path"
    )


def _without_partner(examples: list[Listed], policy: str, root: pathlib.Path) -> tuple[list[Listed], list[Rejected]]:
    missing = [example for example in examples if not example.partner]
    if not missing or policy == KEEP:
        return examples, []
    if policy == REFUSE or len(missing) == len(examples):
        names = ", ".join(example.image for example in missing[:5])
        raise DataError(
            f"{root}: {len(missing)} of {len(examples)} H&E images have no partner (first {names}): add the files, or "
            "pass --missing-partner quarantine to leave them out, keep to train with them unpaired"
        )
    found = [Rejected(e.image, e.example_id, MISSING_PARTNER, "no partner image of this name") for e in missing]
    return [example for example in examples if example.partner], found


# --- folders


def _pair_folders(
    root: pathlib.Path, names: tuple[str, str], *, need_partner: bool = False
) -> list[tuple[str, pathlib.Path, pathlib.Path | None]]:
    """(split, folder of images, folder of partners) of every part; a flat layout has one part without a name."""
    images = (names[0],) if names[0] else IMAGE_FOLDERS
    partners = (names[1],) if names[1] else PARTNER_FOLDERS
    found = []
    for split in ("", *SPLITS):
        for first in images:
            for image, other in ((root / split / first, root / split), (root / first / split, root)):
                if not image.is_dir() or not images_in(image):
                    continue
                tail = () if image.parent == other else (split,)
                sides = [other.joinpath(second, *tail) for second in partners]
                partner = next((side for side in sides if side.is_dir()), None)
                if need_partner and partner is None:
                    raise DataError(
                        f"{image} has no partner folder: looked for {', '.join(map(str, sides))}; give its name with "
                        "--partner-folder"
                    )
                if (split, image) not in [(s, i) for s, i, _ in found]:
                    found.append((split, image, partner))
    return found


def _folder(
    root: pathlib.Path, names: tuple[str, str], *, from_names: bool = False
) -> tuple[list[Listed], list[Rejected], bool]:
    if not root.is_dir():
        raise DataError(f"{root} is no folder")
    examples, rejected = [], []
    for split, image, partner in _unique_parts(root, _pair_folders(root, names, need_partner=True)):
        files = images_in(image)
        pairs, orphans = match_partners(files, images_in(partner))
        here, there = (folder.relative_to(root).as_posix() for folder in (image, partner))
        for name in files:
            part = split or (_split_in_name(name) if from_names else "")
            other = f"{there}/{pairs[name]}" if name in pairs else ""
            examples.append(Listed(stem(name), f"{here}/{name}", other, split=part))
        rejected += [Rejected(f"{there}/{name}", stem(name), ORPHAN, "no H&E image of this name") for name in orphans]
    return examples, rejected, True


def _unique_parts(root: pathlib.Path, parts: Sequence[tuple[str, pathlib.Path, pathlib.Path | None]]):
    """The parts, if each split has one folder only."""
    splits = [split for split, _, _ in parts]
    if len(set(splits)) < len(splits) or ("" in splits and len(splits) > 1):
        folders = ", ".join(image.relative_to(root).as_posix() for _, image, _ in parts)
        raise DataError(f"{root}: several folders could hold the same part: {folders}; keep one layout")
    return parts


def _split_in_name(name: str) -> str:
    found = BCI_NAME.match(name)
    return found.group(1) if found else ""


# --- MIST


def _mist_root(source: pathlib.Path) -> pathlib.Path | None:
    return next((root for root in (source, source / "TrainValAB") if (root / "trainA").is_dir()), None)


def _mist(source: pathlib.Path) -> tuple[list[Listed], list[Rejected], bool]:
    root = _mist_root(source)
    if root is None:
        raise DataError(f"{source}: no folder trainA or TrainValAB/trainA, as MIST has")
    examples, rejected = [], []
    for part, split in (("train", "train"), ("val", "test")):
        image, partner = root / f"{part}A", root / f"{part}B"
        if not image.is_dir():
            continue
        files, others = images_in(image), images_in(partner) if partner.is_dir() else []
        pairs, orphans = match_partners(files, others)
        here, there = (folder.relative_to(source).as_posix() for folder in (image, partner))
        examples += [
            Listed(stem(name), f"{here}/{name}", f"{there}/{pairs[name]}" if name in pairs else "", split=split)
            for name in files
        ]
        rejected += [Rejected(f"{there}/{name}", stem(name), ORPHAN, "no H&E image of this name") for name in orphans]
    return examples, rejected, True


# --- tables and single images


def _table(path: pathlib.Path) -> tuple[list[Listed], list[Rejected], bool]:
    table = read_text_table(path)
    if "he_path" not in table.columns:
        raise DataError(f"{path}: no column 'he_path'; the table has {list(table.columns)}")
    cells = {name: _cells(table, name) for name in ("he_path", "ihc_path", "label", "group", "split", "example_id")}
    boxes = {name: _boxes(table, name, path) for name in ("he_box", "ihc_box")}
    examples = []
    for row, (image, partner) in enumerate(zip(cells["he_path"], cells["ihc_path"])):
        if not image:
            raise DataError(f"{path}, line {row + 2}: he_path is empty; every example needs its H&E image")
        for file in filter(None, (image, partner)):
            if not (path.parent / file).is_file():
                raise DataError(f"{path}, line {row + 2}: {file} does not exist (paths are relative to the table)")
        example_id = cells["example_id"][row] or stem(pathlib.PurePosixPath(image).name)
        own = [cells[name][row] for name in ("label", "group", "split")]
        examples.append(Listed(example_id, image, partner, *own, boxes["he_box"][row], boxes["ihc_box"][row]))
    return examples, [], any(cells["ihc_path"])


def _cells(table, name: str) -> list[str]:
    if name not in table.columns:
        return [""] * len(table)
    # "0" is a HER2 grade; only words that mean "not available" are blank.
    return ["" if cell.lower() in BLANK else cell for cell in table[name]]


def _boxes(table, name: str, path: pathlib.Path) -> list[Box | None]:
    found: list[Box | None] = []
    for row, cell in enumerate(_cells(table, name)):
        numbers = cell.split()
        if numbers and (len(numbers) != 4 or not all(number.isdecimal() for number in numbers)):
            raise DataError(f"{path}, line {row + 2}: {name} is {cell!r}; expected 'left top right bottom' in pixels")
        found.append(tuple(map(int, numbers)) if numbers else None)
    return found


def _images(root: pathlib.Path) -> tuple[list[Listed], list[Rejected], bool]:
    if not root.is_dir():
        raise DataError(f"{root} is no folder")
    path = root / LABELS_FILE
    if not path.is_file():
        files = images_in(root, deep=True)
        return [Listed(stem(name), name) for name in files], [], False
    table = read_text_table(path)
    if "file" not in table.columns:
        raise DataError(f"{path}: no column 'file'; the table has {list(table.columns)}")
    label, group, split = (_cells(table, name) for name in ("label", "group", "split"))
    examples, rejected = [], []
    for row, file in enumerate(table["file"]):
        if (root / file).is_file():
            examples.append(Listed(stem(file), file, "", label[row], group[row], split[row]))
        else:
            rejected.append(Rejected(file, stem(file), "file missing", f"listed in {LABELS_FILE}, line {row + 2}"))
    listed = set(table["file"])
    rejected += [
        Rejected(name, stem(name), "not listed", f"not in {LABELS_FILE}")
        for name in images_in(root, deep=True)
        if name not in listed
    ]
    return examples, rejected, False
