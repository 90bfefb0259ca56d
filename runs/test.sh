#!/usr/bin/env bash
# Lint, format and the whole test suite, in the same environment. Arguments go to pytest:
# runs/test.sh --slow adds the tests on the real model.
set -euo pipefail
cd "$(dirname "$0")/.."
runs/install.sh
# A file of tests stays on one core, which makes its fixtures once; conftest.py says which go first.
exec "${VENV:-.venv}/bin/python" -m pytest -n auto --dist loadfile --no-loadscope-reorder tests "$@"
