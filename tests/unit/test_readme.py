"""What the README says of annotations is what the code does."""

from pathlib import Path

from criproxy.annotations import markdown

README = Path(__file__).parents[2] / "README.md"


def test_the_tables_of_annotations_are_the_policys() -> None:
    text = README.read_text()
    table = text.split("a test compares. -->\n")[1].split("<!-- /policy -->")[0]
    assert table.strip() == markdown().strip(), "write `python -m criproxy.annotations` into README.md"
