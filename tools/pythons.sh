#!/usr/bin/env bash
# Installs jaxmerge for other Pythons, each into a fresh .venv-VERSION with the newest versions that the ranges
# of pyproject.toml admit, and runs the quick tests there.
# usage: bash tools/pythons.sh 3.12 3.13      any python3.X that is on the path
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n 's/^# usage: /usage: /p' "$0" >&2; exit 2; }
for version in "$@"; do
  command -v "python$version" >/dev/null || { echo "there is no python$version on the path" >&2; exit 2; }
done
for version in "$@"; do
  environment="$PWD/.venv-$version"
  rm -rf "$environment"
  "python$version" -m venv "$environment"
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check ".[test]"
  # From elsewhere, so that it is the installed package: with its data, and its commands.
  (cd / && "$environment/bin/jaxmerge" --help && "$environment/bin/jaxmerge-sweep" --help) >/dev/null
  "$environment/bin/python" -m pip freeze | grep -Ei '^(absl-py|etils|evosax|flax|huggingface|jax|jaxlib|jaxtyping|jinja2|ml_collections|numpy|optax|orbax-checkpoint|plotly|scipy|tqdm|transformers|torch)=='
  "$environment/bin/python" -m pytest -q -m 'not slow'
done
