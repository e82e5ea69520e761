"""What the README says is what the CSVs and the Makefile hold."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_tables_are_those_of_the_results() -> None:
    command = [sys.executable, "-m", "benchmarks.readme_tables", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"run `make readme-tables`\n{result.stderr}"


def test_every_make_target_named_exists() -> None:
    named = set(re.findall(r"`make ([a-z-]+)", (ROOT / "README.md").read_text()))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test", "serve", "eval"} <= named <= targets


def test_every_local_link_exists() -> None:
    for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"):
        links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text())
        assert all((ROOT / link).exists() for link in links), links
