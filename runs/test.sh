#!/usr/bin/env bash
# Lint, format and the whole test suite, in the same environment. Arguments go to pytest:
# runs/test.sh --slow adds the tests on the real model. With runs/test.sh --cuda only those tests
# run that can run on a GPU, and they run there.
set -euo pipefail
cd "$(dirname "$0")/.."
runs/install.sh
# A file of tests stays on one core, which makes its fixtures once; conftest.py says which go first.
spread="-n auto --dist loadfile --no-loadscope-reorder"
if [[ " $* " == *" --cuda "* ]]; then
    spread="-n 6 --dist worksteal" # most of the time is compiling, of a few tests in one file
fi
exec "${VENV:-.venv}/bin/python" -m pytest $spread tests "$@"
