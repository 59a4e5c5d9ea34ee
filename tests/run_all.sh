#!/usr/bin/env bash
# All tests on each backend, in a process of its own; fails if any of them failed, after running them all.
# JAX compiles for most of its time, on one core, so TensorFlow and then PyTorch run beside it.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
logs=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$logs"' EXIT
# Threads that wait for each other must leave their core to the other process.
export OMP_WAIT_POLICY=PASSIVE TF_CPP_MIN_LOG_LEVEL=2

on() {
    KERAS_BACKEND=$1 "$python" -m pytest "${@:2}" 2>&1
    echo $? >"$logs/$1.status"
}

on jax "$@" >"$logs/jax" &
for backend in tensorflow torch; do
    echo "== $backend"
    on $backend "$@" | tee "$logs/$backend"
done
echo "== jax"
tail -n +1 -f --pid=$! "$logs/jax"
wait

echo
echo "Closing lines of the three runs:"
failed=0
for backend in jax tensorflow torch; do
    echo "$backend"
    # Some libraries still print as the process ends, after pytest's closing line.
    grep -E '^=+ .* in [0-9.]+s.* =+$' "$logs/$backend" | tail -n 1 | grep . ||
        echo "no closing line: pytest did not get to its end"
    [ "$(cat "$logs/$backend.status" 2>/dev/null)" = 0 ] || failed=1
done
exit $failed
