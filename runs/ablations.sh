#!/usr/bin/env bash
# The ablations of docs/results.md. Run runs/reproduce.sh before, because all start from the SFT
# adapters of a seed of it. Some hours on two cores. Killed and run again, it goes on where it was.
#   runs/ablations.sh ESConv.json split.json [seed: 0]
# LABELS=FILE, given to both, adds the generator: its own errors' pairs, or all errors' pairs.
# OTHER_MODEL=FOLDER [OTHER_TEMPLATE=FILE] adds DPO of another model, on pairs that it mined itself
# and on SmolLM2's.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 ESConv.json split.json [seed]" >&2; exit 2; }
seed=${3:-0}
esconv=$(realpath "$1")
split="--split-file $(realpath "$2") --seed $seed"
data="--data $esconv $split"
if [ -e "${OTHER_MODEL:-}" ]; then OTHER_MODEL=$(realpath "$OTHER_MODEL"); fi
OTHER_TEMPLATE=${OTHER_TEMPLATE:+$(realpath "$OTHER_TEMPLATE")}
cd "$(dirname "$0")/.."
made=out/esconv/$seed
[ -e $made/sp/sft ] || { echo "$0: $made/sp/sft is missing; run runs/reproduce.sh" >&2; exit 2; }
source runs/steps.sh
out=out/ablations/$seed
few="--train-dialogues 60"
# A third of reproduce.sh's steps, so at four times its rate.
dpo="--lr 2e-4 --epochs 1 --eval-every 12 --keep last"
scored="--eval-dialogues 60 --reply-dialogues -1 --seeds 3 --calibrate frequencies"

# The planner.
sp="--task sp $data --eval-dialogues 20"
systems="sft=sp:$made/sp/sft"
# mine NAME FLAGS: pairs of 60 dialogues, into $out/NAME
mine() {
  copy $made/sp/sft $out/$1/sp/sft
  step $out/$1/sp/config.json mine_preferences.py $sp --out $out/$1 $few "${@:2}"
}
# train PAIRS NAME FLAGS: DPO on them
train() {
  step $out/$1/$2/sp/dpo/metrics.jsonl train_dpo.py $sp --out $out/$1/$2 --sft $made/sp/sft \
      --pairs $out/$1/sp $dpo "${@:3}"
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
    train exact-$T T$T-beta$beta --dropout 0 --beta $beta --eval-every 6
  done
done
step $out/eval/results.json evaluate.py $data $scored --out $out --report $out/report.html \
    --systems $systems
records=$out/eval

# A planner that reads the strategies of earlier turns, as vanilla does.
tagged=$out/tagged
mkdir -p $tagged
step $tagged/ESConv.json examples/tag_turns.py "$esconv" $tagged/ESConv.json
on_tagged="--data $tagged/ESConv.json $split --out $tagged"
step $tagged/sp/sft/metrics.jsonl train_sft.py --task sp $on_tagged --eval-dialogues 20 \
    --train-dialogues 200 --lr 5e-4 --epochs 1 --dropout 0
step $tagged/eval/results.json evaluate.py $on_tagged --reply-dialogues -1 --seeds 3 \
    --calibrate frequencies --systems tagged-sft=sp:$tagged/sp/sft
records="$records $tagged/eval"

# The generator, on errors that the annotator names: its own, or all ("no decoupling of errors").
annotator=out/esconv/replies/annotate/sft
if [ "${LABELS:-}" ]; then
  rg="--task rg $data --eval-dialogues 4"
  judged="--annotator local --max-new-tokens 64 $few"
  paper=$out/paper
  copy $made/sp/sft $paper/sp/sft
  copy $made/rg/sft $paper/rg/sft
  copy $annotator $paper/annotate/sft
  step $paper/sp/config.json mine_preferences.py --task sp $data --eval-dialogues 4 --out $paper \
      --routing paper $judged
  copy $paper $out/all-to-rg # whose answers are the same
  systems="sft=sp:$made/sp/sft,rg:$made/rg/sft"
  for routing in paper all-to-rg; do
    here=$out/$routing
    step $here/rg/config.json mine_preferences.py $rg --out $here --routing $routing $judged
    step $here/rg/dpo/metrics.jsonl train_dpo.py $rg --out $here --dropout 0 $dpo
    systems="$systems $routing=sp:$made/sp/sft,rg:$here/rg/dpo"
  done
  step $paper/eval/results.json evaluate.py $data --out $paper --eval-dialogues 20 --seeds 3 \
      --max-new-tokens 64 --annotator local --systems $systems
  records="$records $paper/eval"
fi

# Another model.
if [ "${OTHER_MODEL:-}" ]; then
  model="--model $OTHER_MODEL ${OTHER_TEMPLATE:+--chat-template $OTHER_TEMPLATE}"
  other=$out/other
  step $other/sp/sft/metrics.jsonl train_sft.py $sp $model --out $other $few --lr 5e-4 --epochs 1 \
      --dropout 0
  step $other/sp/config.json mine_preferences.py $sp $model --out $other $few
  systems="other-sft=sp:$other/sp/sft"
  for pairs in other drawn; do # its own, and SmolLM2's
    step $other/on-$pairs/sp/dpo/metrics.jsonl train_dpo.py $sp $model --out $other/on-$pairs \
        --sft $other/sp/sft --pairs $out/$pairs/sp --dropout 0 $dpo
    systems="$systems on-$pairs=sp:$other/on-$pairs/sp/dpo"
  done
  step $other/eval/results.json evaluate.py $data $model $scored --out $other --systems $systems
  records="$records $other/eval"
fi
"${VENV:-.venv}/bin/python" benchmarks/experiments.py --record $records \
    --file out/ablations/experiments.jsonl
