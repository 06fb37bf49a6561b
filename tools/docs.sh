#!/usr/bin/env bash
# Makes a site of the guides (docs/) and of the public names' docstrings; a warning is an error.
# usage: bash tools/docs.sh [DIRECTORY]      build/docs by default: look at index.html there
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-build/docs}"
bash tools/install.sh test
PYTHONPATH=. .venv/bin/python -m sphinx -W --keep-going -q -E -b html -d "$out.doctrees" docs "$out"
echo "$out/index.html"
