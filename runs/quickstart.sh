#!/usr/bin/env bash
# Everything once, on the sample dialogues with SmolLM2-135M: SFT, mining and DPO of the planner and of the generator, then evaluation.
# Under 8 minutes on two CPU cores after the installation. A few dialogues and steps show how it goes; they do not make a good model.
set -euo pipefail
cd "$(dirname "$0")/.."
runs/install.sh
python=.venv/bin/python
trap 'echo "error: quickstart stopped at line $LINENO; what it said last tells why. Running it again is safe." >&2' ERR
begin=$SECONDS
small="--out out/quickstart --eval-dialogues 1"

$python train_sft.py --task sp $small --lr 5e-4 --epochs 1 --dropout 0 --batch-size 16
$python mine_preferences.py --task sp $small --train-dialogues 8
$python train_dpo.py --task sp $small --lr 1e-4 --batch-size 8 --dropout 0 --keep last

$python train_sft.py --task rg $small --lr 5e-4 --epochs 1 --dropout 0 --batch-size 8 --train-dialogues 6
$python mine_preferences.py --task rg $small --train-dialogues 3 --max-new-tokens 48
$python train_dpo.py --task rg $small --lr 2e-4 --batch-size 8 --dropout 0 --keep last

$python evaluate.py --out out/quickstart --reply-dialogues 1 --max-new-tokens 48 --show 3 --seeds 3 --report out/quickstart/report.html
echo "done in $((SECONDS - begin)) s; look at out/quickstart/report.html, and talk with it: .venv/bin/python chat.py --out out/quickstart"
