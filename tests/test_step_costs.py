"""The benchmark of the costs of a step: kernels, parts and floors."""

import pytest
from checks import once

from benchmarks.training import step_costs
from keras_jamba import estimation
from keras_jamba.converters import jamba

KERNELS = {
    "scan_backward": "selective scan",
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT": "other matrix products",
    "gemm_fusion_dot_187": "other matrix products",
    "_ZN7cutlass13device_kernelIN2at4cuda_GroupProblemShape": "products of the experts",
    "bank_gradient": "products of the experts",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, cutlass::bfloat16_t>>": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)": "attention",
    "void at::native::vectorized_gather_kernel<16, long>": "routing and moving of tokens",
    "wrapped_concatenate_16": "copies and casts",
    "MemcpyD2D": "copies and casts",
    "loop_add_subtract_fusion_16": "fusions of the compiler",
    "void at::native::reduce_kernel<128, 4>": "other operations",
}


@once
@pytest.mark.parametrize("kernel, part", KERNELS.items())
def test_each_kernel_belongs_to_a_part_of_the_step(kernel, part):
    assert step_costs.part_of(kernel) == part


@once
@pytest.mark.parametrize("name", ["446M", "3B"])
def test_the_products_have_the_operations_of_the_report(name):
    config, rows = step_costs.SHAPES[name]
    rates = {"FLOPs": 1e3, "bytes": 1e3, "exponentials": 1e3}
    found = step_costs.floors(config, rows, parameters=1, rates=rates)
    arguments = jamba.arguments({"model_type": "jamba", "architectures": ["JambaForCausalLM"]} | config)
    report = estimation.model_report(arguments, batch_size=rows, context=step_costs.TOKENS)
    products = sum(found.get(part, 0) for part in ("other matrix products", "products of the experts", "attention"))
    # The report also counts the scan and element-wise operations, and attention of all pairs.
    assert 0.85 < products / report.flops_per_step < 1
