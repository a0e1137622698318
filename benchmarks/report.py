"""Turns benchmark results into Markdown tables, and with --out also into plots.

    python -m benchmarks.report [--results FOLDER] [--out DIR]

DIR gets report.md and one figure per result as PNG and SVG (needs Matplotlib, the extra "report").
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import common


def load_results(folder: pathlib.Path) -> list[dict[str, Any]]:
    """All results of a folder, by file name.

    Raises:
      ValueError: if a file is not a result of the current schema, or there is none.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        try:
            common.check_record(record)
        except ValueError as e:
            raise ValueError(f"{path.name} {e}") from e
        records.append(record)
    if not records:
        raise ValueError(f"no results (*.json) in {folder.name}: run e.g. `python -m benchmarks.bench_step` first")
    return records


def render(records: Iterable[Mapping[str, Any]], figures: Mapping[str, str] | None = None) -> str:
    """One section per result: where and when it ran, its figure, its metrics, its verdicts.

    Args:
      records: results.
      figures: benchmark -> path of its figure, relative to the page.
    """
    return "\n\n".join(_section(record, (figures or {}).get(record["benchmark"])) for record in records) + "\n"


def write(records: Sequence[Mapping[str, Any]], directory: pathlib.Path) -> None:
    """Writes report.md and the figures of all results that have any metrics."""
    from benchmarks import plots

    directory.mkdir(parents=True, exist_ok=True)
    figures = plots.save_all(records, directory)
    (directory / "report.md").write_text(render(records, figures))


def _section(record: Mapping[str, Any], figure: str | None = None) -> str:
    host, versions = record["host"], record["versions"]
    where = f"{host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB; device {record['device_kind']}"
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [f"## {record['benchmark']}", "", f"{record['timestamp']}, commit {record['git']}; {where}.", ""]
    lines += [f"Versions: {software}.", "", record["notes"], ""]
    if figure:
        lines += [f"![{record['benchmark']}]({figure})", ""]
    metrics = [
        (name, *(number(m[key]) for key in ("median", "p10", "p90")), str(m["n"]), m["unit"])
        for name, m in record["metrics"].items()
    ]
    lines += [table(("metric", "median", "p10", "p90", "n", "unit"), metrics), ""]
    leaves = list(flatten(record["derived"]))
    tables = [(name, value) for name, value in leaves if _is_rows(value)]
    facts = [(name, number(value)) for name, value in leaves if not _is_rows(value)]
    lines.append(table(("derived", "value"), facts))
    for name, rows in tables:
        header = list(rows[0])
        lines += ["", f"{name}:", "", table(header, [[number(row.get(key, "")) for key in header] for row in rows])]
    return "\n".join(lines)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) of nested mappings, in order."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def number(value: Any) -> str:
    """Four significant digits for a float, thousands separated; yes and no for truth values; text as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS, help="folder of *.json")
    parser.add_argument("--out", type=pathlib.Path, help="folder for report.md and figures; default: print tables")
    args = parser.parse_args()
    records = load_results(args.results)
    if args.out is None:
        print(render(records), end="")
    else:
        write(records, args.out)
        print(f"{args.out / 'report.md'}: {len(records)} results")


if __name__ == "__main__":
    main()
