#!/usr/bin/env bash
# Lint, format and the whole test suite, in the same environment. Arguments go to pytest:
# runs/test.sh --slow adds the tests on the real model. With runs/test.sh --cuda only those tests
# run that can run on a GPU, and they run there.
set -euo pipefail
cd "$(dirname "$0")/.."
runs/install.sh
processes=auto
if [[ " $* " == *" --cuda "* ]]; then
    processes=6 # a process for each file that has such tests
fi
# A file of tests stays on one core, which makes its fixtures once; conftest.py says which go first.
exec "${VENV:-.venv}/bin/python" -m pytest -n "$processes" --dist loadfile --no-loadscope-reorder \
    tests "$@"
