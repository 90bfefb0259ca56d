#!/usr/bin/env bash
# Everything once, on the sample dialogues with SmolLM2-135M: SFT, mining and DPO of the planner and
# of the generator, then an evaluation. A few dialogues show how it goes; they make no good model.
set -Eeuo pipefail # E: the trap below holds in functions, too
cd "$(dirname "$0")/.."
runs/install.sh
out=${OUT:-out/quickstart}
desc() { echo; echo "── $*"; "${VENV:-.venv}/bin/python" "$@"; }
trap 'echo "error: quickstart stopped at line $LINENO; the lines above say why." >&2
      echo "It is safe to run it again." >&2' ERR
begin=$SECONDS
cat <<'TEXT'
Seven programs, on two cores together 1 to 3 minutes with AMX, 2 to 7 with AVX2 alone:
  planner    SFT on 6 dialogues, mining of 3, DPO on the pairs found
  generator  SFT on 2 dialogues, mining of 2, DPO on the pairs found
  both       evaluated on the 3 test dialogues, before and after DPO
TEXT

sp="--task sp --out $out --eval-dialogues 1"
desc train_sft.py $sp --train-dialogues 6 --epochs 1 --lr 5e-4 --batch-size 8 --dropout 0
desc mine_preferences.py $sp --train-dialogues 3
desc train_dpo.py $sp --lr 1e-4 --batch-size 8 --dropout 0 --keep last

rg="--task rg --out $out --eval-dialogues 1"
desc train_sft.py $rg --train-dialogues 2 --epochs 1 --lr 5e-4 --batch-size 8 --dropout 0
desc mine_preferences.py $rg --train-dialogues 2 --max-new-tokens 24
desc train_dpo.py $rg --lr 2e-4 --eval-pairs 2 --batch-size 8 --dropout 0 --keep last

desc evaluate.py --out $out --reply-dialogues 1 --max-new-tokens 24 --seeds 3 \
    --show 3 --report $out/report.html
echo
echo "done in $((SECONDS - begin)) s: look at $out/report.html, and talk with the modules:"
echo "    ${VENV:-.venv}/bin/python -m desc.chat --out $out"
