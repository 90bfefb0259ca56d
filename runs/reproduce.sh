#!/usr/bin/env bash
# The measurements of docs/results.md: SmolLM2-135M on ESConv, on a CPU, in some hours.
#   runs/reproduce.sh ESConv.json split.json [training dialogues of the planner: 400]
# A 7B model on GPUs wants the four steps of README.md with the scripts' own defaults instead: they are the paper's.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 ESConv.json split.json [training dialogues]" >&2; exit 2; }
data="--data $(realpath "$1") --split-file $(realpath "$2") --out out/esconv"
cd "$(dirname "$0")/.."
runs/install.sh
python=.venv/bin/python

sp="--task sp $data --train-dialogues ${3:-400}"
$python train_sft.py --compile --eval-dialogues 20 --eval-every 60 $sp --lr 5e-4 --epochs 1 --dropout 0
$python mine_preferences.py --eval-dialogues 20 $sp
$python train_dpo.py --compile --task sp $data --eval-dialogues 20 --eval-every 20 --lr 5e-5 --dropout 0
$python evaluate.py $data --reply-dialogues -1
rm -rf out/esconv/eval-sp && mv out/esconv/eval out/esconv/eval-sp  # the next evaluation writes there too

rg="--task rg $data --train-dialogues 60 --eval-dialogues 4"
$python train_sft.py --compile $rg --lr 5e-4 --epochs 1 --dropout 0
$python mine_preferences.py $rg --max-new-tokens 64
$python train_dpo.py --compile --task rg $data --eval-dialogues 4 --eval-every 10 --lr 5e-5 --dropout 0
$python evaluate.py $data --eval-dialogues 20 --max-new-tokens 64 --show 3
