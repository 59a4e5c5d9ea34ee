"""Reading of prompts, in equal chunks of a bounded number of tokens."""

import numpy as np
from keras import ops

from keras_jamba import _backend
from keras_jamba.ops import implementations

# Tokens of all rows per chunk. More tokens take more memory, and hardly less time.
TOKENS, TOKENS_WITH_TRITON = 2048, 16384
# The shortest chunk of a compiled program, and the longest that is rounded up to a power of two.
MIN_CHUNK, LONGEST_POWER = 16, 256


def longest_chunk(rows):
    """Returns the most tokens of a row that are read at a time."""
    # Without its kernels, the scan on an accelerator holds the states of all tokens.
    budget = TOKENS_WITH_TRITON if implementations().get("triton", "unknown") is None else TOKENS
    return max(budget // rows, MIN_CHUNK)


def prefilled(step, token_ids, mask, cache, longest):
    """Runs a model on prompts.

    Args:
        step: `step(inputs, cache) -> (logits (b, 1, v) of the last token, cache)`.
        token_ids, mask: `(b, t)` NumPy arrays, int32 and bool, padded on the left.
        cache: the cache before these tokens.
        longest: the most tokens of a row per step.

    Returns:
        `(logits (b, v) of the last tokens, cache)`.
    """
    length = token_ids.shape[1]
    count = -(-length // longest)
    size = -(-length // count)
    if _backend.compilation.has_jit():
        size = min(_rounded(size), longest)
        # Padding takes no capacity of the cache.
        padding = ((0, 0), (size * count - length, 0))
        token_ids, mask = np.pad(token_ids, padding), np.pad(mask, padding)
    for begin in range(0, token_ids.shape[1], size):
        chunk = slice(begin, begin + size)
        inputs = {"token_ids": ops.convert_to_tensor(token_ids[:, chunk])}
        if not mask[:, chunk].all():
            inputs["padding_mask"] = ops.convert_to_tensor(mask[:, chunk])
        logits, cache = step(inputs, cache)
    return logits[:, -1], cache


def _rounded(size):
    """Returns a size of a chunk, rounded up by at most a quarter beyond LONGEST_POWER.

    Fewer sizes need fewer compiled programs.
    """
    if size <= LONGEST_POWER:
        return max(MIN_CHUNK, 1 << (size - 1).bit_length())
    step = 1 << ((size - 1).bit_length() - 3)
    return -(-size // step) * step
