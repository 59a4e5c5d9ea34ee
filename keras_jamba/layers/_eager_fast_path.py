"""A short call path for layers without Keras' checks of arguments."""

from typing import Any

from keras_jamba import _backend
from keras_jamba._keras_internals import Mixin, autocast, get_keras_mask, set_keras_mask


class EagerFastPath(Mixin):
    """A mixin for a layer that adds no losses and does not use `training`.

    `keras.layers.Layer.__call__` takes several times as long as the launch of one operation, and a model has hundreds
    of such calls. In eager mode, `__call__` passes arguments that need no conversion directly to `call`. It does so for
    classes of this package only: a subclass may add losses, masks or arguments that Keras fills in.
    """

    _is_of_package = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._is_of_package = cls.__module__.startswith("keras_jamba.")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Keras removes `training`, which functional models pass to every layer.
        if "training" in kwargs or not _backend.trainer.can_bypass_layer_call(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)
        with autocast(self.compute_dtype if self.autocast else None):
            outputs = self.call(*args, **kwargs)
        mask = kwargs.get("mask")
        if mask is not None:
            first = outputs[0] if isinstance(outputs, tuple) else outputs
            if get_keras_mask(first) is None:
                set_keras_mask(first, mask)
        return outputs
