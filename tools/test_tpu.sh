#!/usr/bin/env bash
# Tests that compile for TPUs which are not there. libtpu (700 MB) stays out of .venv: every process that
# found it there would look for TPUs first, and complain that there are none.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/install.sh test
[ -d .cache/libtpu ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
  --constraint constraints.txt --target .cache/libtpu libtpu
PYTHONPATH=.cache/libtpu .venv/bin/python -m pytest -q -m tpu tests/planning/slices_test.py "$@"
