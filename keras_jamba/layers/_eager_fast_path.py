"""A short call path for layers of about one operation."""

from keras_jamba import _backend
from keras_jamba._keras_internals import autocast


class EagerFastPath:
    """A mixin for a layer of one tensor that assigns nothing, adds no losses and ignores `training`.

    `keras.layers.Layer.__call__` takes several times as long as the launch of one operation, and a model has hundreds
    of such calls. In eager mode, `__call__` passes a tensor that needs no conversion directly to `call`.
    """

    def __call__(self, *args, **kwargs):
        if kwargs or len(args) != 1 or not _backend.trainer.can_bypass_layer_call(self, args[0]):
            return super().__call__(*args, **kwargs)
        with autocast(self.compute_dtype):
            return self.call(args[0])
