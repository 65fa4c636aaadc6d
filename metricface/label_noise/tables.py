"""CSV files that a spreadsheet opens without running anything in them, and that come back as they were."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from metricface.atomic import replacing

# A cell that begins with one of these is a formula to a spreadsheet; a file name may begin with any of them.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_DELIMITERS = (",", ";", "\t")

Cell = str | int | float


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> int:
    """Write a table as CSV: UTF-8 with a byte order mark, which spreadsheets need to read names right. Atomic.

    rows: one cell a column. Text that a spreadsheet would take for a formula gets an apostrophe in front, which
    `read_table` takes off again; numbers are written with up to 6 digits. Bytes of file names that are not UTF-8 are
    kept as they are. Returns the number of rows. Raises OSError where the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")  # and so a cell with either is quoted
    writer.writerow(columns)
    number = 0
    for row in rows:
        number += 1
        writer.writerow([_safe(cell) if isinstance(cell, str) else f"{cell:.6g}" for cell in row])
    with replacing(path) as file:
        file.write(b"\xef\xbb\xbf" + text.getvalue().encode("utf-8", "surrogateescape"))
    return number


def read_table(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Read the wanted columns of a CSV as text, with the number of each row's line in the file.

    Commas, semicolons or tabs part the cells, whichever the first line has; further columns are passed over, and so
    are empty lines. Raises ValueError for a missing column, a short row and text that is no CSV; OSError where the file
    cannot be read.
    """
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    first = text.split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    found = []
    try:
        header = [name.strip() for name in next(reader, [])]
        missing = [name for name in columns if name not in header]
        if missing:
            raise ValueError(
                f"{path} has no column {' and no column '.join(missing)}; its first line names {', '.join(header)}. "
                f"The first line must name {', '.join(columns)}."
            )
        places = [header.index(name) for name in columns]
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) <= max(places):
                raise ValueError(f"{path}, line {reader.line_num}: {len(row)} cells, but the columns are {header}.")
            found.append((reader.line_num, {n: _plain(row[at]) for n, at in zip(columns, places, strict=True)}))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is no CSV: {error}.") from error
    return found


def _safe(text: str) -> str:
    return f"'{text}" if text.lstrip("'").startswith(_FORMULA) else text


def _plain(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(_FORMULA) else cell
