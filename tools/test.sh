#!/usr/bin/env bash
# All checks: format, lint, types, tests, two at a time. Arguments go to pytest: bash tools/test.sh -k merge
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/install.sh test
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/pyright
.venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
