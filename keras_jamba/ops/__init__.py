"""Stateless maths on tensors.

The package uses these shape letters:

- `b` batch, `t` tokens per row, `v` vocabulary
- `d` d_model, `e` expand * d_model, `f` d_ff
- `n` d_state, `w` d_conv (kernel width), `r` dt_rank
- `h` query heads, `g` key-value heads, `c` head width
- `x` experts, `k` experts per token
- `s` a second count of tokens: keys and values or cache slots in attention, all `b * t` tokens in routing
"""

from keras_jamba.ops.attention import attention_implementations, attention_weights, grouped_query_attention
from keras_jamba.ops.convolution import causal_depthwise_conv
from keras_jamba.ops.cross_entropy import linear_cross_entropy
from keras_jamba.ops.experts import expert_mlp
from keras_jamba.ops.rotary import rotary_embedding
from keras_jamba.ops.routing import (
    expert_share,
    router_z_loss,
    routing_statistics,
    switch_balance_loss,
    top_k_routing,
    variance_balance_loss,
)
from keras_jamba.ops.scan import implementations, selective_scan

__all__ = [
    "attention_implementations",
    "attention_weights",
    "causal_depthwise_conv",
    "expert_mlp",
    "expert_share",
    "grouped_query_attention",
    "implementations",
    "linear_cross_entropy",
    "rotary_embedding",
    "router_z_loss",
    "routing_statistics",
    "selective_scan",
    "switch_balance_loss",
    "top_k_routing",
    "variance_balance_loss",
]
