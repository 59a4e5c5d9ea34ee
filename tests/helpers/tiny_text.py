"""A two-layer language model with the same weights on every backend, and a tokenizer of letters."""

import numpy as np

import keras_jamba

SIZE = 27


class Letters:
    """A tokenizer with one token per letter. The space is token 0."""

    eos_token_id = None

    def encode(self, text):
        return [" abcdefghijklmnopqrstuvwxyz".index(letter) for letter in text]

    def decode(self, ids):
        return "".join(" abcdefghijklmnopqrstuvwxyz"[i] for i in ids)


def tiny(seed=0, vocab_size=SIZE, noise=0.0, **given):
    """Returns a model of a Mamba layer with experts and an attention layer.

    Its seeded weights are never neutral, so that any mistake changes the outputs. `noise` perturbs them.
    """
    defaults = dict(d_model=16, num_layers=2, mamba_ratio=1, num_heads=2, num_kv_heads=1, d_ff=16, d_state=4)
    defaults |= dict(num_experts=3, num_experts_per_token=2, moe_offset=0, pad_token_id=0)
    model = keras_jamba.JambaCausalLM(vocab_size, **defaults | given)
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        if len(variable.shape) == 1:
            start = -3 if variable.path.endswith("dt_bias") else variable.path.endswith(("scale", "/D"))
            variable.assign(start + 0.3 * rng.normal(size=variable.shape))
        elif not variable.path.endswith("A_log"):
            width = 1 if "embedding" in variable.path else 2 * variable.shape[-2] ** -0.5
            variable.assign(rng.normal(size=variable.shape) * width)
        if noise:
            variable.assign(variable + noise * np.random.default_rng(1).normal(size=variable.shape))
    model.tokenizer = Letters()
    return model
