"""Norms that `benchmarks.training.short_training` compares, and a context that builds a stem with one of them."""

from contextlib import contextmanager

from keras import layers, ops

from keras_jamba.layers.vision import spatial_encoder


class CountingNorm(layers.BatchNormalization):
    """Batch norm that debiases its moving statistics with an additional variable, for timing."""

    def build(self, shape):
        super().build(shape)
        self.remaining = self.add_weight(shape=(), name="kept", initializer="ones", trainable=False, autocast=False)

    def call(self, x, training=None):
        x = ops.cast(x, "float32")
        if training and self.trainable:
            mean, variance = ops.moments(x, axes=self._reduction_axes)
            self.remaining.assign(self.remaining * self.momentum)
            update = (1 - self.momentum) / (1 - self.remaining)
            self.moving_mean.assign(self.moving_mean + (mean - self.moving_mean) * update)
            self.moving_variance.assign(self.moving_variance + (variance - self.moving_variance) * update)
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
    """Builds stems with the norms of `make` inside the context. None keeps the package's norms."""
    before = spatial_encoder.BatchNormalization
    spatial_encoder.BatchNormalization = make or before
    try:
        yield
    finally:
        spatial_encoder.BatchNormalization = before
