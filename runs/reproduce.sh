#!/usr/bin/env bash
# The tables of docs/results.md on ESConv: SmolLM2-135M on a CPU, in some hours. Killed and run again, it goes on where it was.
#   runs/reproduce.sh ESConv.json split.json [training dialogues of the planner: 400]
# A 7B model on GPUs wants the four steps of README.md with the scripts' own defaults instead: they are the paper's.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 ESConv.json split.json [training dialogues]" >&2; exit 2; }
data="--data $(realpath "$1") --split-file $(realpath "$2") --out out/esconv"
cd "$(dirname "$0")/.."
runs/install.sh
python=.venv/bin/python
step() { [ -e "out/esconv/$1" ] || $python "${@:2}"; }  # the last file that a step leaves, and the step

sp="--task sp $data --eval-dialogues 20"
train="--train-dialogues ${3:-400}"
step sp/sft/last/config.json train_sft.py --compile --save-every 10 $sp $train --eval-every 60 --lr 5e-4 --epochs 1 --dropout 0
step sp/config.json mine_preferences.py $sp $train
step sp/dpo/last/config.json train_dpo.py --compile --save-every 10 $sp --eval-every 20 --lr 5e-5 --dropout 0

rg="--task rg $data --eval-dialogues 4"
train="--train-dialogues 60"
step rg/sft/last/config.json train_sft.py --compile --save-every 10 $rg $train --lr 5e-4 --epochs 1 --dropout 0
step rg/config.json mine_preferences.py $rg $train --max-new-tokens 64
step rg/dpo/last/config.json train_dpo.py --compile --save-every 10 $rg --eval-every 10 --lr 5e-5 --dropout 0
step eval/results.json evaluate.py $data --reply-dialogues 40 --max-new-tokens 64 --seeds 3 --report out/esconv/report.html
