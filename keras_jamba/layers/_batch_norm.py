"""Batch norm with unbiased moving statistics from the first batch on."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_jamba")
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch norm over the last axis. The first batch replaces the initial moving statistics, mean 0 and variance 1.

    `keras.layers.BatchNormalization` averages its initial values with the batch statistics. After n batches their share
    is `momentum**n`, so that inference is wrong for dozens of steps if the real variance is small. Here the average
    begins with the first batch: `moving = batch`, then `moving += (1 - momentum) * (batch - moving)`. Adam removes the
    bias of its averages for the same reason, with a step count. This layer needs no count: a channel has seen no batch
    while its moving mean is exactly 0 and its moving variance exactly 1.

    A frozen layer (`trainable=False`) keeps its statistics. The weights have the names, shapes and order of Keras'
    layer. The class has the same name, because paths in Keras' weight files contain it. Weight files of either class
    load into both.

    Args:
        momentum: share of the moving statistics that an update keeps, from 0 to 1.
        epsilon: number added to the variance.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: `(b, ..., channels)`.
        training: whether to normalize with the batch statistics and to update the moving statistics.

    Returns:
        A tensor of the same shape, in the compute dtype. Statistics are float32 or wider.

    Reference:
        [Ioffe and Szegedy (2015)](https://arxiv.org/abs/1502.03167); bias of moving averages:
        [Kingma and Ba (2015)](https://arxiv.org/abs/1412.6980), section 3.
    """

    def __init__(self, momentum=0.8, epsilon=1e-3, **kwargs):
        super().__init__(momentum=momentum, epsilon=epsilon, **kwargs)

    def call(self, inputs, training=None):
        if not (training and self.trainable):
            return super().call(inputs, training=False)
        x = ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))
        mean, variance = ops.moments(x, axes=list(range(len(x.shape) - 1)))
        self._update(mean, variance)
        gamma, beta = ops.cast(self.gamma, x.dtype), ops.cast(self.beta, x.dtype)
        y = ops.batch_normalization(x, mean, variance, axis=-1, offset=beta, scale=gamma, epsilon=self.epsilon)
        return ops.cast(y, self.compute_dtype)

    def _update(self, mean, variance):
        moving_mean, moving_variance = (ops.cast(v, mean.dtype) for v in (self.moving_mean, self.moving_variance))
        # Zeros and ones are tensors: PyTorch would copy a constant to the device and synchronise.
        unseen = ops.logical_and(
            ops.equal(moving_mean, ops.zeros_like(mean)), ops.equal(moving_variance, ops.ones_like(variance))
        )
        share = (1.0 - self.momentum) + self.momentum * ops.cast(unseen, mean.dtype)
        self.moving_mean.assign(moving_mean + share * (mean - moving_mean))
        self.moving_variance.assign(moving_variance + share * (variance - moving_variance))

    def get_config(self):
        config = super().get_config()
        return {name: config[name] for name in ("name", "trainable", "dtype", "momentum", "epsilon")}
