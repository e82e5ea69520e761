"""The documents' tables are what the CSVs hold, and the README stays short."""

import subprocess
import sys

from benchmarks.readme_tables import DOCUMENTS
from tests.support.documents import ROOT


def test_tables_are_those_of_the_results() -> None:
    command = [sys.executable, "-m", "benchmarks.readme_tables", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"run `make readme-tables`\n{result.stderr}"


def test_each_table_stands_in_one_document() -> None:
    for name, tables in DOCUMENTS.items():
        text = (ROOT / name).read_text()
        for mark in tables:
            assert text.count(f"<!-- {mark} -->") == text.count(f"<!-- end {mark} -->") == 1
        assert text.count("<!-- end ") == len(tables), f"{name}: a table that nothing fills in"


def test_the_readme_is_a_first_look() -> None:
    assert (ROOT / "README.md").read_text().count("\n") <= 120
