#!/usr/bin/env bash
# All tests on each backend, in a process of its own; fails if any of them failed, after running them all.
# JAX and TensorFlow compile for most of their time, on one core each; as one of them ends, a third of the test files
# begins on PyTorch, and so on.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
logs=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$logs"' EXIT
# Threads that wait for each other must leave their core to the other process.
export OMP_WAIT_POLICY=PASSIVE TF_CPP_MIN_LOG_LEVEL=2

runs=(jax tensorflow torch-3 torch-1 torch-2)

on() {
    KERAS_BACKEND=${1%-?} "$python" -m pytest "${@:2}" >"$logs/$1" 2>&1
    echo $? >"$logs/$1.status"
}

# Of a single file some of the parts are empty, which pytest answers with 5.
part() {
    on "torch-$1" --part "$1/3" "${@:2}"
    sed -i 's/^5$/0/' "$logs/torch-$1.status"
}

all() {
    trap 'kill $(jobs -p) 2>/dev/null' TERM
    on tensorflow "$@" &
    on jax "$@" &
    # The longest part first, so that both cores end together.
    for i in 3 1 2; do
        wait -n
        part "$i" "$@" &
    done
    wait
}

for run in "${runs[@]}"; do touch "$logs/$run"; done
all "$@" &
for run in "${runs[@]}"; do
    echo "== $run"
    tail -n +1 -f "$logs/$run" &
    shown=$!
    until [ -s "$logs/$run.status" ]; do sleep 1; done
    sleep 1
    kill $shown
done
wait

echo
echo "Closing lines of the runs:"
failed=0
for run in "${runs[@]}"; do
    echo "$run"
    # Some libraries still print as the process ends, after pytest's closing line.
    grep -E '^=+ .* in [0-9.]+s.* =+$' "$logs/$run" | tail -n 1 | grep . ||
        echo "no closing line: pytest did not get to its end"
    [ "$(cat "$logs/$run.status" 2>/dev/null)" = 0 ] || failed=1
done
exit $failed
