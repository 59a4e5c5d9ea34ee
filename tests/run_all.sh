#!/usr/bin/env bash
# All tests on each backend, in a process of its own; fails if any of them failed, after running them all.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
failed=0
for backend in jax tensorflow torch; do
    echo "== $backend"
    KERAS_BACKEND=$backend TF_CPP_MIN_LOG_LEVEL=2 "$python" -m pytest "$@" 2>&1 | tee "$logs/$backend"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
done
echo
echo "Closing lines of the three runs:"
for backend in jax tensorflow torch; do
    echo "$backend"
    # Some libraries still print as the process ends, after pytest's closing line.
    grep -E '^=+ .* in [0-9.]+s.* =+$' "$logs/$backend" | tail -n 1 | grep . ||
        echo "no closing line: pytest did not get to its end"
done
exit $failed
