#!/usr/bin/env bash
# What is measured on a machine with a GPU: gpu.sh {check|scan|step|moe|lm|sharding} [torch|jax]
# Peers (mamba-ssm, causal-conv1d, transformers) that are not installed are printed as missing.
set -euo pipefail
cd "$(dirname "$0")/.."
export KERAS_BACKEND=${2:-torch} PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" XLA_PYTHON_CLIENT_PREALLOCATE=false
case "${1:-}" in
    check)
        # Not the ones of tests on a CPU, which some versions do not know on a GPU.
        export XLA_FLAGS=${XLA_FLAGS:-}
        # JAX would multiply float32 in TF32 there.
        export JAX_DEFAULT_MATMUL_PRECISION=highest
        python3 -m pytest -q tests/ops/test_scan.py tests/ops/test_sequences.py tests/ops/test_experts.py \
            tests/training/test_captured_steps.py
        python3 benchmarks/gpu_scan.py --parts check long ;;
    scan) python3 benchmarks/gpu_scan.py --parts check scan ;;
    step) python3 benchmarks/gpu_step.py ;;
    moe) python3 benchmarks/gpu_moe.py ;;
    lm) python3 benchmarks/gpu_lm.py ;;
    sharding) KERAS_BACKEND=jax python3 benchmarks/gpu_sharding.py ;;
    *) echo "Usage: benchmarks/gpu.sh {check|scan|step|moe|lm|sharding} [torch|jax]. Received: ${*:-nothing}." >&2; exit 2 ;;
esac
