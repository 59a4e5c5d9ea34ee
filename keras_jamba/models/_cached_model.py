"""The cache of a backbone: steps, growth and rollback."""

from collections.abc import Sequence

import keras

from keras_jamba._typing import Tensor, Tensors
from keras_jamba.layers import AttentionLayer, JambaBlock
from keras_jamba.layers._masks import mask_of
from keras_jamba.layers._requested import append_requested
from keras_jamba.models.base import JambaModel
from keras_jamba.ops import _checks


class CachedModel(JambaModel):
    """The abstract base of `JambaBackbone`, which runs its blocks on a cache.

    Attributes:
        blocks: the list of `JambaBlock`s.
        final_norm: the norm after the last block.
    """

    blocks: list[JambaBlock]
    final_norm: keras.layers.Layer

    def init_cache(self, batch_size: int, max_length: int | None = None) -> dict[str, Tensors]:
        """Returns the state before the first token.

        Attention without a window has capacity for `max_length` tokens per document.
        """
        return {name: block.init_cache(batch_size, max_length) for name, block in self._named_blocks()}

    def grow_cache(self, cache: dict[str, Tensors], max_length: int) -> dict[str, Tensors]:
        """Returns a cache that continues `cache`, with capacity for `max_length` tokens including those seen so far."""
        caches = {}
        for name, block in self._named_blocks():
            caches[name] = cache[name]
            if isinstance(block.mixer, AttentionLayer):
                caches[name] = block.mixer.grow_cache(cache[name], max_length)
        return caches

    def step(
        self,
        features: Tensor,
        cache: dict[str, Tensors],
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        reset_mask: Tensor | None = None,
        return_rollback_state: bool = False,
    ) -> tuple[Tensors, ...]:
        """Continues from a cache by further tokens: a prefill, or one token at a time.

        Args:
            features: `(b, t, d)`, any t.
            cache: the result of `init_cache` or of an earlier step. It is not changed, so earlier caches stay valid.
            padding_mask, segment_ids, reset_mask: `(b, t)` or None, as in a call.
            return_rollback_state: whether to also return the rollback state for `rollback`.

        Returns:
            `((b, t, d), cache)`; the cache keeps its shapes. With `return_rollback_state`, also the rollback state.

        Raises:
            ValueError: if the cache is of another model or batch, or a row's document exceeds the capacity of
                attention. Inside compiled functions and on accelerators, the outputs of such a row are NaN instead.
        """
        _checks.check_last_axis("JambaBackbone", features.shape, self._config["d_model"])
        self._check_state(cache)
        given = dict(mask=mask_of(features, padding_mask), segment_ids=segment_ids, reset_mask=reset_mask)
        given |= {"return_rollback_state": True} if return_rollback_state else {}
        caches: dict[str, Tensors] = {}
        rollback_states: dict[str, Tensors] = {}
        for name, block in self._named_blocks():
            features, caches[name], *rollback_state = block.step(features, cache[name], **given)
            rollback_states |= {name: rollback_state[0]} if return_rollback_state else {}
        return append_requested(self.final_norm(features), (True, caches), (return_rollback_state, rollback_states))

    def rollback(
        self, rollback_state: dict[str, Tensors] | Sequence[dict[str, Tensors]], count: Tensor | Sequence[int]
    ) -> dict[str, Tensors]:
        """Returns the cache after only the first `count` tokens of a step, as if the step had no other tokens.

        No projection and no expert runs again: only the scan and the convolution state are recomputed, and keys and
        values are rewritten.

        Args:
            rollback_state: the last rollback state of `step`, or a list of the rollback states of successive steps.
            count: `(b,)` integers, the number of tokens to keep per row, including padding: from 0, which returns the
                cache before the step, to all, which returns the cache after it.

        Returns:
            A cache, as `step` returns it.

        Raises:
            ValueError: for another rollback_state, and for counts out of range if the host can read them.

        Example:
            >>> import keras, keras_jamba
            >>> backbone = keras_jamba.models.JambaBackbone(d_model=64, num_layers=4, mamba_ratio=3)
            >>> features = keras.random.normal((2, 5, 64))
            >>> cache = backbone.init_cache(2, 16)
            >>> _, cache, rollback_state = backbone.step(features, cache, return_rollback_state=True)
            >>> cache = backbone.rollback(rollback_state, [0, 3])

        Reference:
            [Leviathan et al. (2023)](https://arxiv.org/abs/2211.17192), whose speculative decoding needs rollback.
        """
        rollback_states = rollback_state if isinstance(rollback_state, (list, tuple)) else [rollback_state]
        for each in rollback_states:
            self._check_state(each, "rollback_state")
        blocks = self._named_blocks()
        return {name: block.rollback([each[name] for each in rollback_states], count) for name, block in blocks}

    def _named_blocks(self):
        return [(f"block_{i}", block) for i, block in enumerate(self.blocks)]

    def _check_state(self, state, kind="state"):
        names = [name for name, _ in self._named_blocks()]
        if state is not None and not (isinstance(state, dict) and sorted(state) == sorted(names)):
            have = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"The {kind} of this backbone must be a dict with {names}. Received: {have}. "
                "Pass what init_cache, step or a call of the same model returned."
            )
