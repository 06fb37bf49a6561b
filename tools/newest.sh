#!/usr/bin/env bash
# The tests of meshes and of checkpoints on the newest JAX, which needs Python 3.12 or newer: in .venv-newest, at the
# versions of constraints.txt, without torch.
# usage: bash tools/newest.sh [PYTEST ARGUMENTS]      PYTHON=/path/to/python3.13 takes that one
set -euo pipefail
cd "$(dirname "$0")/.."
is_new() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }
python=""
pyenv="$(pyenv root 2>/dev/null || true)"  # whose python3.13 on the path runs only where it is chosen
for candidate in ${PYTHON:-python3.13 "$pyenv"/versions/3.13.*/bin/python python3.12 python3}; do
  if is_new "$candidate"; then python="$candidate"; break; fi
done
[ -n "$python" ] || { echo "the newest JAX needs Python 3.12 or newer; set PYTHON to one" >&2; exit 2; }
stamp=.venv-newest/installed
wanted="$(cat pyproject.toml constraints.txt | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing into .venv-newest ..."
  [ -x .venv-newest/bin/python ] || "$python" -m venv .venv-newest
  .venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
    --editable . pytest pytest-xdist beartype
  echo "$wanted" > "$stamp"
fi
.venv-newest/bin/python -c 'import jax, sys; print("Python", sys.version.split()[0], "jax", jax.__version__)'
.venv-newest/bin/python -m pytest -q -n 2 -m 'not slow and not tpu' tests/models/lookup_test.py \
  tests/evaluation/evaluator_test.py tests/sharding_test.py tests/checkpoints/orbax_test.py \
  tests/checkpoints/orbax_others_test.py "$@"
