"""pytest tests/test_style.py

Lint and format (ruff.toml), and lines of at most 100 columns in what ruff does not read."""

import subprocess
import sys

import pytest
from scripts import ROOT


@pytest.mark.parametrize("check", [("check", "--quiet"), ("format", "--check", "--quiet")])
def test_ruff_is_content(check):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *check, str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("pattern", ["*.md", "docs/*.md", "runs/*.sh", ".ci/run"])
def test_prose_and_shell_stay_within_100_columns(pattern):
    """But for tables, whose rows Markdown cannot break."""
    paths = list(ROOT.glob(pattern))
    lines = [(path.name, line) for path in paths for line in path.read_text().splitlines()]
    long = [(name, line) for name, line in lines if len(line) > 100 and not line.startswith("|")]
    assert lines and not long
