#!/usr/bin/env bash
# Runs the GPU benchmarks: gpu.sh {check|scan|attention|step|moe|lm|packed|chats|costs|generation|soak|load|sharding} [torch|jax]
# Prints peers (mamba-ssm, causal-conv1d, transformers) that are not installed as missing.
set -euo pipefail
cd "$(dirname "$0")/.."
export KERAS_BACKEND=${2:-torch} PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" XLA_PYTHON_CLIENT_PREALLOCATE=false
case "${1:-}" in
    check)
        # Without this, the tests set flags for CPUs, which some versions of XLA reject on a GPU.
        export XLA_FLAGS=${XLA_FLAGS:-}
        # By default, JAX multiplies float32 in TF32 on a GPU.
        export JAX_DEFAULT_MATMUL_PRECISION=highest
        python3 -m pytest -q tests/ops/test_scan.py tests/ops/test_isolation.py tests/ops/test_attention.py tests/ops/test_sequences.py \
            tests/ops/test_experts.py tests/layers/test_norm.py \
            tests/training/test_captured_steps.py
        python3 -m benchmarks.scan.gpu --parts check long ;;
    scan) python3 -m benchmarks.scan.gpu --parts check scan ;;
    step) python3 -m benchmarks.training.captured_step ;;
    moe) python3 -m benchmarks.moe.gpu ;;
    attention) python3 -m benchmarks.attention.gpu ;;
    lm) python3 -m benchmarks.training.language_model ;;
    packed) python3 -m benchmarks.training.packed --rounds 3 ;;
    chats) python3 -m benchmarks.training.chat_adapters ;;
    costs) python3 -m benchmarks.training.step_costs ;;
    generation) python3 -m benchmarks.decoding.gpu ;;
    soak) python3 -m benchmarks.decoding.soak ;;
    load) python3 -m benchmarks.decoding.load --shape 3B ;;
    sharding) KERAS_BACKEND=jax python3 -m benchmarks.scaling.sharding ;;
    *) echo "Usage: benchmarks/gpu.sh {check|scan|attention|step|moe|lm|packed|chats|costs|generation|soak|load|sharding} [torch|jax]. Received: ${*:-nothing}." >&2; exit 2 ;;
esac
