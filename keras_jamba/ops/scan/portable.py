"""The selective scan that trains fast without native code: chunks of tokens, a gradient written by hand."""

from keras_jamba import _backend
from keras_jamba.ops.scan._gating_and_masks import with_gating_and_masks

if _backend.compilation.has_jit():
    from keras_jamba.ops.scan.xla_chunks import recurrence
else:
    from keras_jamba.ops.scan.torch_chunks import recurrence


def why_not(call):
    if _backend.tensors.is_traced_by_torchscript():
        return "what TorchScript traces of it, for torch.onnx too, loses the state"
    return None


run = with_gating_and_masks(recurrence)
