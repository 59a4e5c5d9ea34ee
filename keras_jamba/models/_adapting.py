"""Making a model one's own: low-rank adapters, and weights in few bits."""

import inspect
from pathlib import Path

import keras

from keras_jamba import _files, _keras_internals
from keras_jamba.layers import lora
from keras_jamba.layers._quantizable import quantizable_layers
from keras_jamba.layers.quantization import QUANTIZATIONS, float_shapes, quantize
from keras_jamba.models import _adapters
from keras_jamba.models._saved_state import SavedState


class Adapting(SavedState):
    """A model with `quantize`, `enable_lora`, `merge_lora`, `save_lora` and `load_lora`."""

    def __new__(cls, *args, **kwargs):
        model = super().__new__(cls, *args, **kwargs)
        # Keras puts a check of its own modes before every model's method.
        vars(model).pop("quantize", None)
        return model

    def quantize(self, mode, config=None, filters=None):
        """Stores the weights in few bits; `from_preset(..., quantization=mode)` never has them in more.

        Args:
            mode: "int8", "int4" or "experts_int8"; see `keras_jamba.layers.quantize`, which says which weights.
            config, filters: not taken.

        Raises:
            ValueError: for another mode, a config or filters, and where weights are in few bits already.

        Example:
            >>> import keras_jamba
            >>> model = keras_jamba.DHCJamba.from_preset("digits")
            >>> model.quantize("int8")
        """
        if config is not None or filters is not None:
            raise ValueError(
                f"A model is quantized as its mode says. Received: config={config!r}, filters={filters!r}. Leave them "
                "out."
            )
        quantize(self, mode)
        for model in (self, *self._inner()):
            model._config["quantization"] = mode
        self._changed()

    def enable_lora(self, rank, targets=None, lora_alpha=None, also_train=()):
        found = lora.enable_lora(self, rank, targets, lora_alpha, also_train)
        self._changed()
        return found

    def merge_lora(self):
        lora.merge_lora(self)
        self._changed()

    enable_lora.__doc__ = inspect.getdoc(lora.enable_lora).replace("a layer or model, ", "the model, ")
    merge_lora.__doc__ = inspect.getdoc(lora.merge_lora)

    def save_lora(self, file):
        """Writes the adapters, and what was trained whole beside them, to a safetensors file.

        The file appears whole or not at all; an older one of this name is replaced.

        Raises:
            ValueError: if the model has no adapters, or a number in them is not finite.
        """
        _adapters.save(self, file)

    def load_lora(self, source):
        """Takes over what `save_lora` wrote for a model of these sizes; adapters are added where there are none.

        Args:
            source: the file. A folder is one of PEFT's, `adapter_config.json` and `adapter_model.safetensors`, for
                models that transformers has too.

        Raises:
            ValueError: if the file is damaged, or of another model or other adapters. Nothing is changed then.
        """
        if Path(source).is_dir():
            self._load_peft(source)
        else:
            _adapters.load(self, source)
        self._changed()

    def save(self, filepath, overwrite=True, zipped=None, **kwargs):
        """Keras' own. The file keeps adapters, what is frozen, and of text models tokenizer, sampler and
        generation_config. A `.keras` file appears whole or not at all, except on remote paths and with
        `overwrite=False`.

        Raises:
            ValueError: before the file is opened, for a model that would come back as another: with weights in other
                bits than its configuration says, or a tokenizer or sampler that cannot be saved.
        """
        self._check_comes_back()
        # Keras asks before it overwrites, and knows remote paths.
        if overwrite and zipped is not False and _is_local_archive(filepath):
            with _files.atomic_file(filepath) as staged:
                super().save(staged, zipped=zipped, **kwargs)
        else:
            super().save(filepath, overwrite, zipped, **kwargs)

    def _check_comes_back(self):
        """Raises a ValueError for what a `.keras` file would not keep."""
        self._check_is_as_configured()
        self.get_config()
        self.get_compile_config()

    def get_build_config(self):
        # Keras asks for it wherever it writes a model down, inside another one too.
        self._check_is_as_configured()
        return super().get_build_config()

    def _check_has_no_adapters(self):
        if any(lora.is_adapter(v) for v in self.weights):
            raise ValueError(
                "Presets and checkpoints of transformers hold a model without adapters. Received: a model with "
                "adapters. Call merge_lora first, save_lora for the adapters alone, or model.save('model.keras') for "
                "both."
            )

    def _check_is_as_configured(self):
        """What is remade from the configuration must have the weights that this model has."""
        mode = self._config["quantization"]
        for _, layer in quantizable_layers(self):
            expected = QUANTIZATIONS.get(mode, {}).get(None if layer.keeps_float else layer.KIND)
            if layer.quantization_mode != expected:
                raise ValueError(
                    f"A model is saved in the bits of its configuration. Received: quantization={mode!r}, and "
                    f"{layer.path!r} in {layer.quantization_mode or 'floating point'}. Call quantize of the whole "
                    "model, which notes it."
                )

    def float_shapes(self):
        """`{path: shape}` of the weights as they would be in floating point and without adapters."""
        return float_shapes(self)

    def _load_peft(self, folder):
        raise ValueError(
            f"Only models that transformers has take PEFT's adapters. Received: {str(folder)!r}, a folder, and a "
            f"{type(self).__name__}. Pass a file that save_lora wrote."
        )

    def _inner(self):
        return [layer for layer in _keras_internals.sublayers(self, include_self=False) if isinstance(layer, Adapting)]

    def _changed(self):
        """What was compiled, and the optimizer, know other variables."""
        self.train_function = self.test_function = self.predict_function = None
        optimizer = getattr(self, "optimizer", None)
        if optimizer is not None and optimizer.built:
            self.optimizer = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))


def _is_local_archive(filepath):
    return str(filepath).endswith(".keras") and Path(filepath).parent.is_dir()
