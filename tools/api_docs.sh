#!/usr/bin/env bash
# Makes pages of the public names from their docstrings; a warning is an error.
# usage: bash tools/api_docs.sh [DIRECTORY]      build/api by default: look at index.html there
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-build/api}"
[ -x .venv/bin/sphinx-build ] || bash tools/install.sh test
PYTHONPATH=. .venv/bin/python -m sphinx -W --keep-going -q -E -b html -d "$out.doctrees" docs "$out"
echo "$out/index.html"
