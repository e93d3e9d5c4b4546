#!/usr/bin/env bash
# The main job on a real model and real data: plan, train, merge, export, package, then an answer from the device folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

echo "== real data and model"
python tools/data.py
python tools/models.py smollm2-135m-instruct
echo "== plan, train, merge, export, package"
edgepeft run --model models/smollm2-135m-instruct --data data/sentiment-prompts --out runs/demo --seq-len 128 \
  --set max_steps=24 --set evaluations=2 --set validation_limit=48 "$@"
echo "== an answer from the device folder, without torch"
edgepeft infer runs/demo/device $'Review: A warm, funny film that never outstays its welcome.\nSentiment:'
