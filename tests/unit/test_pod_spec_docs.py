"""Every row of docs/pod-spec.md names tests, and they are there."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs/pod-spec.md"
ROWS = [line for line in DOCS.read_text().splitlines() if line.startswith("| ") and not line.startswith("| Pod spec |")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_the_tests_of_a_row_exist(row: str) -> None:
    tests = re.findall(r"\[(\w+)\]\(([^)]+)\)", row.split("|")[3])
    assert tests, "a row names the test that shows it"
    for name, file in tests:
        found = re.search(rf"^ *(async )?def {name}\(", (DOCS.parent / file).read_text(), re.MULTILINE)
        assert found, f"there is no {name} in {file}"
