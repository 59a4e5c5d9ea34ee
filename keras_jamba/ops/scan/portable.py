"""The selective scan for fast training without native code: chunks of tokens and a hand-written gradient."""

from keras_jamba import _backend
from keras_jamba.ops.scan._gating_and_masks import with_gating_and_masks

if _backend.compilation.has_jit():
    from keras_jamba.ops.scan.xla_chunks import recurrence
else:
    from keras_jamba.ops.scan.torch_chunks import recurrence


def why_not(call):
    if _backend.tensors.is_traced_by_torchscript():
        return "a TorchScript trace of it, which torch.onnx also uses, loses the state"
    if _backend.autodiff.is_transformed():
        return "it does not support torch.func"
    return None


run = with_gating_and_masks(recurrence)
