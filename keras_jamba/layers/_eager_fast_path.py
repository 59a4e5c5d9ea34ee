"""Layers that are hardly more than one operation."""

from keras_jamba import _backend
from keras_jamba._keras_internals import autocast


class EagerFastPath:
    """A layer of one tensor that assigns nothing, adds no losses and is the same in training.

    What Keras does around a call takes several times as long as to launch the operation, and a model has hundreds of
    such calls: where operations are launched one by one, a tensor that is as the layer wants it goes straight to
    `call`.
    """

    def __call__(self, *args, **kwargs):
        if kwargs or len(args) != 1 or not _backend.trainer.can_bypass_layer_call(self, args[0]):
            return super().__call__(*args, **kwargs)
        with autocast(self.compute_dtype):
            return self.call(args[0])
