#!/usr/bin/env bash
# Makes the environment of the survey's harness and runs survey_harness.py in it.
#
# Usage: bash benchmarks/survey_harness.sh DIRECTORY [ROUNDS] [REPOSITORY]
#
# DIRECTORY takes 2 GB. REPOSITORY is the authors' (https://github.com/xw-yao/peft_comparison) or a clone of it: it has
# their fork of `adapters`, at the commit before the runs of table 5 (21 December 2023), which wants transformers
# 4.33.3. peft and accelerate are those of that month. torch is newer than theirs: it is the one that edgepeft is
# measured with, and no release of 2023 has a CPU wheel on PyPI.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
directory=$1
rounds=${2:-3}
repository=${3:-https://github.com/xw-yao/peft_comparison}
commit=6622ea9b855d36fceef7506b7efebeab4c03636d

python3.11 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet torch==2.13.0
"$directory/venv/bin/pip" install --quiet \
    transformers==4.33.3 peft==0.7.1 accelerate==0.25.0 tokenizers==0.13.3 huggingface-hub==0.25.2 numpy==1.26.4
[ -d "$directory/theirs" ] || git clone --quiet "$repository" "$directory/theirs"
git -C "$directory/theirs" checkout --quiet "$commit"

export PYTHONPATH="$directory/theirs/adapter-transformers/src:$root"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
exec "$directory/venv/bin/python" "$root/benchmarks/survey_harness.py" "$rounds"
