#!/usr/bin/env bash
# The tables of docs/results.md on ESConv: SmolLM2-135M on a CPU, in some hours. Killed and run
# again, it goes on where it was. What came out of it here lies in docs/experiments.jsonl.
#   runs/reproduce.sh ESConv.json split.json [training dialogues of planners: 200] [seeds: "0 1 2"]
# LABELS=FILE (README.md, "Mining with an annotator") trains an annotator on it, which then names
# the errors of the replies.
# For a 7B model on GPUs take the four steps of README.md with the scripts' defaults instead: they
# are the paper's, but for DPO's rate, vanilla's beta and --strategy-at turn, which are ours.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 ESConv.json split.json [dialogues] [seeds]" >&2; exit 2; }
esconv="--data $(realpath "$1") --split-file $(realpath "$2")"
labels=${LABELS:+$(realpath "$LABELS")}
cd "$(dirname "$0")/.."
runs/install.sh
source runs/steps.sh
many="--train-dialogues ${3:-200}"
few="--train-dialogues 60" # of what writes replies
sft="--lr 5e-4 --epochs 1 --dropout 0 --save-every 10"
dpo="--lr 5e-5 --epochs 1 --dropout 0 --save-every 10 --eval-every 10 --keep last"

for seed in ${4:-0 1 2}; do
  out=out/esconv/$seed
  data="$esconv --seed $seed"

  # The planner, as published: beta 0.5, errors drawn at T 0.7.
  sp="--task sp $data --eval-dialogues 20"
  step $out/sp/sft/metrics.jsonl train_sft.py $sp --out $out $many $sft
  step $out/sp/config.json mine_preferences.py $sp --out $out $many
  step $out/sp/dpo/metrics.jsonl train_dpo.py $sp --out $out $dpo

  # The planner by the law of self-mined pairs: beta 1, all errors at T 1 (docs/tour.md, section 7).
  law=$out/law
  copy $out/sp/sft $law/sp/sft
  exact="--exact --temperature 1 --top-p 1"
  step $law/sp/config.json mine_preferences.py $sp --out $law $many $exact
  step $law/sp/dpo/metrics.jsonl train_dpo.py $sp --out $law $dpo --beta 1

  # The same planner, if it reads the chat's messages instead of one text.
  messages=$out/messages
  by_messages="$sp --history messages --out $messages"
  step $messages/sp/sft/metrics.jsonl train_sft.py $by_messages $many $sft
  step $messages/sp/config.json mine_preferences.py $by_messages $many $exact
  step $messages/sp/dpo/metrics.jsonl train_dpo.py $by_messages $dpo --beta 1

  # One model for both. Its mining writes replies, so it has fewer dialogues.
  vanilla="--task vanilla $data --eval-dialogues 20 --out $out"
  step $out/vanilla/sft/metrics.jsonl train_sft.py $vanilla $many $sft
  step $out/vanilla/config.json mine_preferences.py $vanilla $few --max-new-tokens 64
  step $out/vanilla/dpo/metrics.jsonl train_dpo.py $vanilla $dpo

  step $out/eval/results.json evaluate.py $data --out $out --report $out/report.html \
      --reply-dialogues -1 --seeds 3 --calibrate frequencies --systems \
      vanilla-dpo=vanilla:$out/vanilla/dpo vanilla-sft=vanilla:$out/vanilla/sft \
      sft=sp:$out/sp/sft dpo=sp:$out/sp/dpo dpo-early=sp:$out/sp/dpo/best law=sp:$law/sp/dpo \
      messages-sft=sp:$messages/sp/sft messages-law=sp:$messages/sp/dpo
done

# The generator, and all replies, with the first seed's planners.
seed=${4:-0}
seed=${seed%% *}
out=out/esconv/$seed
rg="--task rg $esconv --seed $seed --out $out --eval-dialogues 4"
step $out/rg/sft/metrics.jsonl train_sft.py $rg $few $sft
step $out/rg/config.json mine_preferences.py $rg $few --max-new-tokens 64
step $out/rg/dpo/metrics.jsonl train_dpo.py $rg $dpo
replies=out/esconv/replies
answered="--eval-dialogues 40 --max-new-tokens 64 --seeds 3"
if [ "$labels" ]; then
  step $replies/annotate/sft/metrics.jsonl train_sft.py --task annotate $esconv --seed $seed \
      --out $replies --labels "$labels" --epochs 3 --lr 5e-4 --dropout 0 --save-every 10
  answered="$answered --annotator local"
fi
step $replies/eval/results.json evaluate.py $esconv --seed $seed --out $replies $answered \
    --report $replies/report.html --systems \
    vanilla-dpo=vanilla:$out/vanilla/dpo vanilla-sft=vanilla:$out/vanilla/sft \
    sft=sp:$out/sp/sft,rg:$out/rg/sft dpo=sp:$out/sp/dpo,rg:$out/rg/dpo \
    law=sp:$out/law/sp/dpo,rg:$out/rg/dpo
"${VENV:-.venv}/bin/python" benchmarks/experiments.py \
    --record out/esconv/*/eval --plot out/esconv/frontier.png --file out/esconv/experiments.jsonl
