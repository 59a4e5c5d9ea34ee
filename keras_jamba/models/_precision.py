"""The dtypes in which a model can be trained."""

import keras


def check_trainable_dtypes(model):
    """Checks that no trainable weight is stored in float16.

    Raises:
        ValueError: for a weight in float16. Gradients and the optimizer's squared gradients underflow in float16, and
            the weights become NaN.
    """
    found = [v.path for v in model.trainable_variables if keras.backend.standardize_dtype(v.dtype) == "float16"]
    if found:
        raise ValueError(
            "Weights in float16 cannot be trained: gradients and squares of gradients fall below its range. Received: "
            f"{found[0]!r} in float16, of {len(found)} such weights. Build or load the model with "
            "dtype='mixed_float16', 'mixed_bfloat16' or 'bfloat16', or train adapters by enable_lora."
        )
