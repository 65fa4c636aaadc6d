from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metricface.label_noise.tables import read_table, write_table

AWKWARD = [
    "=1+1",
    "'=1+1",
    "''=x",
    "-name",
    "@a",
    "+b",
    "\tc",
    "'quoted'",
    "O'Neill",
    "a,b",
    'say "x"',
    "Zoë/1.jpg",
    "",
]


def cells(path: Path) -> list[str]:
    return [row["key"] for _, row in read_table(path, ["key"])]


def test_text_comes_back_as_it_was_also_where_a_spreadsheet_would_see_a_formula(tmp_path: Path) -> None:
    rows = [(text, "x") for text in AWKWARD]
    assert write_table(tmp_path / "t.csv", ("key", "other"), rows) == len(AWKWARD)
    assert cells(tmp_path / "t.csv") == AWKWARD


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("=+-@\t\r\n'\",;"), max_size=8)))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    write_table(path, ("key", "other"), [(text, "x") for text in texts])
    assert cells(path) == texts


def test_no_cell_of_text_begins_as_a_formula_and_numbers_stay_numbers(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", ("key", "score"), [(text, -0.25) for text in AWKWARD if "," not in text])
    lines = (tmp_path / "t.csv").read_bytes().decode("utf-8-sig").splitlines()[1:]
    assert not any(line.lstrip('"').startswith(("=", "+", "-", "@", "\t")) for line in lines)
    assert all(line.endswith(",-0.25") for line in lines)


def test_the_file_is_utf_8_with_the_mark_that_spreadsheets_need(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", ("key",), [("Zoë",)])
    assert (tmp_path / "t.csv").read_bytes() == b"\xef\xbb\xbfkey\r\nZo\xc3\xab\r\n"


def test_a_file_name_that_is_not_utf_8_keeps_its_bytes(tmp_path: Path) -> None:
    name = b"Jos\xe9/1.jpg".decode("utf-8", "surrogateescape")
    write_table(tmp_path / "t.csv", ("key",), [(name,)])
    assert cells(tmp_path / "t.csv") == [name]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_that_a_spreadsheet_saved_in_another_country_is_read(tmp_path: Path, delimiter: str) -> None:
    lines = ["more,key,other", "1,Ann/1.jpg,x", ",,", "2,Beth/2.jpg,y"]
    (tmp_path / "t.csv").write_bytes("\r\n".join(lines).replace(",", delimiter).encode())
    assert read_table(tmp_path / "t.csv", ["key", "other"]) == [
        (2, {"key": "Ann/1.jpg", "other": "x"}),
        (4, {"key": "Beth/2.jpg", "other": "y"}),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name,action\nx,drop\n", "no column key"),
        ("\n", "no column key"),
        ("action,key\ndrop\n", "line 2: 1 cells"),
        ('key\n"open', "line 2 is no CSV"),
    ],
)
def test_a_broken_table_is_an_error_that_names_the_place(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_table(tmp_path / "t.csv", ["key"])
