"""Files whose reader, the next daemon for one, finds all of the new content or all of the old."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Also when we are killed in the middle; not when the power fails. Raises OSError."""
    draft = path.with_name(f"{path.name}.new")
    if isinstance(content, str):
        draft.write_text(content)
    else:
        draft.write_bytes(content)
    draft.replace(path)
