#!/usr/bin/env bash
# The whole test suite in the same environment. Arguments go to pytest: runs/test.sh --slow adds the tests on the real model.
set -euo pipefail
cd "$(dirname "$0")/.."
runs/install.sh
# A file on each core; those that run whole scripts take longest, so they begin.
first="tests/test_scripts.py tests/test_distributed.py"
exec .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $first tests "$@"
