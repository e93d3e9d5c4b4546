#!/usr/bin/env bash
# Lint, types and all tests, in an environment of its own. Arguments go to pytest: bash tools/test.sh -k parity
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

# Nothing in the tests may come from a hub, and thread pools that outnumber the cores only slow each other down.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

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
python -m pytest -q "$@"
