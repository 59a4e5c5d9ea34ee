"""The norms that short_training.py compares, and how a stem is built with one of them."""

from contextlib import contextmanager

from keras import layers, ops

from keras_jamba.layers.vision import spatial_encoder


class CountingNorm(layers.BatchNormalization):
    """Batch norm whose moving statistics are debiased by a variable of its own, for the times."""

    def build(self, shape):
        super().build(shape)
        self.kept = self.add_weight(shape=(), name="kept", initializer="ones", trainable=False, autocast=False)

    def call(self, x, training=None):
        x = ops.cast(x, "float32")
        if training and self.trainable:
            mean, variance = ops.moments(x, axes=self._reduction_axes)
            self.kept.assign(self.kept * self.momentum)
            share = (1 - self.momentum) / (1 - self.kept)
            self.moving_mean.assign(self.moving_mean + (mean - self.moving_mean) * share)
            self.moving_variance.assign(self.moving_variance + (variance - self.moving_variance) * share)
        else:
            mean, variance = self.moving_mean, self.moving_variance
        y = ops.batch_normalization(x, mean, variance, -1, self.beta, self.gamma, self.epsilon)
        return ops.cast(y, self.compute_dtype)


NORMS = {
    "group norm, 8 groups": lambda **given: layers.GroupNormalization(8, epsilon=1e-3, **given),
    "layer norm": lambda **given: layers.LayerNormalization(epsilon=1e-3, **given),
    "RMS norm": lambda **given: layers.RMSNormalization(epsilon=1e-3, **given),
}
LAYERS = {
    "constant": lambda **given: layers.BatchNormalization(momentum=0.9, **given),
    "package": None,
    "debiased, a variable": lambda **given: CountingNorm(momentum=0.9, **given),
    **NORMS,
}


@contextmanager
def norms(make):
    """The stem is built with these norms inside; None leaves the package's own."""
    before = spatial_encoder.BatchNormalization
    spatial_encoder.BatchNormalization = make or before
    try:
        yield
    finally:
        spatial_encoder.BatchNormalization = before
