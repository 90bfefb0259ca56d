#!/usr/bin/env bash
# The tables of docs/results.md on ESConv: SmolLM2-135M on a CPU, in some hours. Killed and run
# again, it goes on where it was.
#   runs/reproduce.sh ESConv.json split.json [training dialogues of the planner: 400]
# For a 7B model on GPUs take the four steps of README.md with the scripts' defaults instead: they
# are the paper's.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 ESConv.json split.json [training dialogues]" >&2; exit 2; }
data="--data $(realpath "$1") --split-file $(realpath "$2") --out out/esconv"
cd "$(dirname "$0")/.."
runs/install.sh
# the last file that a step leaves, and the step
step() { [ -e "out/esconv/$1" ] || "${VENV:-.venv}/bin/python" "${@:2}"; }

sp="--task sp $data --eval-dialogues 20"
some="--train-dialogues ${3:-400}"
train="$sp --dropout 0 --save-every 10"
step sp/sft/last/config.json train_sft.py $train $some --eval-every 60 --lr 5e-4 --epochs 1
step sp/config.json mine_preferences.py $sp $some
step sp/dpo/last/config.json train_dpo.py $train --eval-every 20 --lr 5e-5

rg="--task rg $data --eval-dialogues 4"
some="--train-dialogues 60"
train="$rg --dropout 0 --save-every 10"
step rg/sft/last/config.json train_sft.py $train $some --lr 5e-4 --epochs 1
step rg/config.json mine_preferences.py $rg $some --max-new-tokens 64
step rg/dpo/last/config.json train_dpo.py $train --eval-every 10 --lr 5e-5
step eval/results.json evaluate.py $data --reply-dialogues 40 --max-new-tokens 64 --seeds 3 \
    --report out/esconv/report.html
