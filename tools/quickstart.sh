#!/usr/bin/env bash
# From nothing to a merged checkpoint: installs, trains a pool of eight small models, searches over their merges.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/install.sh
[ -d pools/quickstart ] || .venv/bin/python tools/make_pool.py --out=pools/quickstart
exec .venv/bin/python -m jaxmerge.run --config=configs/quickstart.py --workdir=runs/quickstart "$@"
