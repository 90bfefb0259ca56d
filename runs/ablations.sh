#!/usr/bin/env bash
# The ablations of docs/results.md: other objectives, dropout, and the law of self-mined pairs for
# several beta and T. Run runs/reproduce.sh before: all start from the SFT planner of a seed of it.
# Some hours on two cores. Killed and run again, it goes on where it was.
#   runs/ablations.sh ESConv.json split.json [seed: 0]
# OTHER_MODEL=FOLDER [OTHER_TEMPLATE=FILE] adds DPO of another model, on pairs that it mined itself
# and on SmolLM2's.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 ESConv.json split.json [seed]" >&2; exit 2; }
seed=${3:-0}
data="--data $(realpath "$1") --split-file $(realpath "$2") --seed $seed"
cd "$(dirname "$0")/.."
sft=out/esconv/$seed/sp/sft
[ -e $sft ] || { echo "$0: $sft is missing; run runs/reproduce.sh first" >&2; exit 2; }
python=${VENV:-.venv}/bin/python
# the last file that a step leaves, and the step
step() { [ -e "$1" ] || "$python" "${@:2}"; }
sp="--task sp $data --eval-dialogues 20"
out=out/ablations/$seed
systems="sft=sp:$sft"

# mine NAME FLAGS: pairs of 60 dialogues, into $out/NAME
mine() {
  if [ ! -e $out/$1/sp/sft ]; then mkdir -p $out/$1/sp; cp -r $sft $out/$1/sp; fi
  step $out/$1/sp/config.json mine_preferences.py $sp --out $out/$1 --train-dialogues 60 "${@:2}"
}
# train PAIRS NAME FLAGS: DPO on them, at four times the rate, for it has a third of the steps
train() {
  step $out/$1/$2/sp/dpo/config.json train_dpo.py $sp --out $out/$1/$2 --sft $out/$1/sp/sft \
      --pairs $out/$1/sp --lr 2e-4 --epochs 1 --eval-every 6 --keep last "${@:3}"
  systems="$systems $2=sp:$out/$1/$2/sp/dpo"
}

# Objectives and dropout, on pairs as the paper draws them (T 0.7, top_p 0.95).
mine drawn
train drawn dpo --dropout 0
train drawn ipo --dropout 0 --objective ipo
train drawn kto --dropout 0 --objective kto
train drawn simpo --dropout 0 --objective simpo
train drawn nll --dropout 0 --sft-weight 0.2
train drawn dropout --dropout 0.05

# The law: all wrong strategies with their probability at T.
for T in 1 0.7; do
  mine exact-$T --exact --temperature $T --top-p 1
  for beta in 0.5 1 2; do
    train exact-$T T$T-beta$beta --dropout 0 --beta $beta
  done
done

scored="--eval-dialogues 60 --reply-dialogues -1 --seeds 3 --calibrate frequencies"
step $out/eval/results.json evaluate.py $data $scored --out $out --report $out/report.html \
    --systems $systems
records=$out/eval

if [ "${OTHER_MODEL:-}" ]; then
  model="--model $OTHER_MODEL ${OTHER_TEMPLATE:+--chat-template $OTHER_TEMPLATE}"
  other=$out/other
  step $other/sp/sft/config.json train_sft.py $sp $model --out $other --train-dialogues 60 \
      --lr 5e-4 --epochs 1 --dropout 0
  step $other/sp/config.json mine_preferences.py $sp $model --out $other --train-dialogues 60
  systems="sft=sp:$other/sp/sft"
  for pairs in other drawn; do # its own, and SmolLM2's
    step $other/on-$pairs/sp/dpo/config.json train_dpo.py $sp $model --out $other/on-$pairs \
        --sft $other/sp/sft --pairs $out/$pairs/sp --dropout 0 \
        --lr 2e-4 --epochs 1 --eval-every 6 --keep last
    systems="$systems on-$pairs=sp:$other/on-$pairs/sp/dpo"
  done
  step $other/eval/results.json evaluate.py $data $model $scored --out $other --systems $systems
  records="$records $other/eval"
fi
"$python" benchmarks/experiments.py --record $records --file out/ablations/experiments.jsonl
