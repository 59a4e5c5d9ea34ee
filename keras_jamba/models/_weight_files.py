"""Loading of `.weights.h5` files, which Keras writes and reads without a checksum."""

from keras_jamba import presets


class WeightFiles:
    """Mixed into a `keras.Model`, before it in the bases."""

    def load_weights(self, filepath, skip_mismatch=False, **kwargs):
        """Loads a file of `save_weights` like `keras.Model.load_weights`.

        Raises:
            ValueError: if the file is damaged or of another model, or a weight is not finite. Some weights may have
                been loaded then.
        """
        try:
            super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)
        except MemoryError:
            raise
        except Exception as error:  # h5py raises errors of many classes
            reason = str(error).strip().removesuffix(".")
            raise ValueError(
                "Weights must be a complete file that save_weights wrote for a model of the same sizes. Received: "
                f"{str(filepath)!r}, {type(error).__name__}: {reason}. Build the model anew, and load another file."
            ) from error
        presets.check_finite(self, str(filepath))
