#!/usr/bin/env bash
# Installs jaxmerge for other Pythons with the newest versions that the ranges of pyproject.toml admit, each into
# .venv-VERSION (made, or brought up to date), and runs the quick tests there.
# usage: bash tools/pythons.sh 3.12 3.13      any python3.X that is on the path
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n 's/^# usage: /usage: /p' "$0" >&2; exit 2; }
for version in "$@"; do
  "python$version" -c '' || { echo "there is no python$version on the path" >&2; exit 2; }
done
failed=()
for version in "$@"; do
  python="$PWD/.venv-$version/bin/python"
  install=("$python" -m pip install --quiet --disable-pip-version-check)
  echo "== Python $version: installing into .venv-$version ..."
  [ -x "$python" ] || "python$version" -m venv ".venv-$version"
  "${install[@]}" --upgrade pip
  # Tests compare with torch, nothing else uses it: at one version, the build without CUDA that pip may know of.
  "${install[@]}" "$(grep '^torch==' constraints.txt)"
  "${install[@]}" --upgrade --upgrade-strategy eager "$(grep '^torch==' constraints.txt)" ".[test]"
  # From elsewhere, so that it is the installed package: with its data, and its commands.
  for command in jaxmerge; do
    (cd / && "${python%/python}/$command" --help) >/dev/null
  done
  echo "== Python $version: $(sed -n '/^dependencies/,/^]/s/^ *"\([a-z0-9-]*\).*/\1/p' pyproject.toml |
    xargs "$python" -m pip show 2>/dev/null | awk '/^Name:/ {name = $2} /^Version:/ {printf "%s %s  ", name, $2}')"
  "$python" -m pytest -q -n 2 --dist loadfile -m 'not slow and not tpu' || failed+=("$version")
done
[ ${#failed[@]} -eq 0 ] || { echo "the tests failed with Python ${failed[*]}" >&2; exit 1; }
