#!/usr/bin/env bash
# All tests on each backend, in a process of its own; fails if any of them failed, after running them all.
# JAX and TensorFlow compile for most of their time, on one core each; PyTorch begins when one of the two has ended.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
logs=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$logs"' EXIT
# Threads that wait for each other must leave their core to the other process.
export OMP_WAIT_POLICY=PASSIVE TF_CPP_MIN_LOG_LEVEL=2

on() {
    KERAS_BACKEND=$1 "$python" -m pytest "${@:2}" >"$logs/$1" 2>&1
    echo $? >"$logs/$1.status"
}

all() {
    trap 'kill $(jobs -p) 2>/dev/null' TERM
    on jax "$@" &
    on tensorflow "$@" &
    wait -n
    on torch "$@" &
    wait
}

touch "$logs"/{jax,tensorflow,torch}
all "$@" &
for backend in jax tensorflow torch; do
    echo "== $backend"
    tail -n +1 -f "$logs/$backend" &
    shown=$!
    until [ -s "$logs/$backend.status" ]; do sleep 1; done
    sleep 1
    kill $shown
done
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
