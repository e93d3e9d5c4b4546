#!/usr/bin/env bash
# Lint, types and all tests, in an environment of its own. Arguments go to pytest: bash tools/test.sh -k parity
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

# Nothing in the tests may come from a hub. Tests run on all cores at once, one thread each, since tiny models gain
# nothing from more; -n 0 runs them one after the other.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

echo "== ruff"
ruff check
ruff format --check
echo "== mypy"
mypy
echo "== docs"
python tools/docs.py --check
echo "== real data and models"
python tools/data.py
python tools/models.py
echo "== pytest"
python -m pytest -q -n logical --maxprocesses 4 "$@"
