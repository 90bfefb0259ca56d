"""Running the project's scripts as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def command(script, *flags, ranks=1) -> list[str]:
    """The command line that runs a script ("….py") or a module of the project."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        if ranks > 1
        else []
    )
    program = [str(ROOT / script)] if str(script).endswith(".py") else ["-m", script]
    return [sys.executable, *torchrun, *program, *map(str, flags)]


def run(script, *flags, cwd=ROOT, fails=False, ranks=1, stdin=None):
    """The script's standard output, or its standard error if it should fail. It must not warn."""
    # The models are so tiny that more threads would only slow them down.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    streams = {"input": stdin, "capture_output": True, "text": True, "errors": "surrogateescape"}
    done = subprocess.run(command(script, *flags, ranks=ranks), cwd=cwd, env=environment, **streams)
    assert bool(done.returncode) is fails, done.stderr
    assert "warn" not in done.stderr.lower(), done.stderr
    return done.stderr if fails else done.stdout


def lines(path):
    """The records of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
