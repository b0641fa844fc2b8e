"""A short `make soak`: what it says is in its own text."""

import json
import subprocess
import sys
from pathlib import Path

from lab import CHECKOUT, requirements
from lab.dialogues import APPLICATIONS

CYCLES = 60


def test_no_client_notices_anything(tmp_path: Path) -> None:
    requirements.check()
    result, plot = tmp_path / "soak.json", tmp_path / "soak.svg"
    # A process of its own, for it is a program, and its lab can run beside that of the other tests.
    done = subprocess.run(
        [sys.executable, "-m", "lab.soak", f"--cycles={CYCLES}", "--seconds=180", f"--json={result}", f"--svg={plot}"],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    found = json.loads(result.read_text())
    assert found["failures"] == []
    assert found["cycles"].keys() == APPLICATIONS.keys()
    assert sum(found["cycles"].values()) >= CYCLES
    assert all(cycles >= CYCLES // len(APPLICATIONS) for cycles in found["oldest_connection_cycles"].values())
    assert plot.read_text().startswith("<svg")
