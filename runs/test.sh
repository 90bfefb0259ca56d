#!/usr/bin/env bash
# The whole test suite in the same environment. Arguments go to pytest: runs/test.sh --slow adds the tests on the real model.
set -euo pipefail
cd "$(dirname "$0")/.."
runs/install.sh
exec .venv/bin/python -m pytest -n auto --dist loadfile tests "$@"  # each file on a core
