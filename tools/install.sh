#!/usr/bin/env bash
# Makes .venv with jaxmerge in it, at the versions of constraints.txt; does nothing when it is up to date.
# usage: bash tools/install.sh [EXTRA]      for example: bash tools/install.sh test
set -euo pipefail
cd "$(dirname "$0")/.."
extra="${1:-}"
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "jaxmerge needs Python 3.11 or newer; set PYTHON to one" >&2
  exit 2
fi
stamp=".venv/installed-${extra:-base}"
wanted="$(cat pyproject.toml constraints.txt | cksum)"
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "installing into .venv ..."
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
  --constraint constraints.txt --editable ".${extra:+[$extra]}"
echo "$wanted" > "$stamp"
