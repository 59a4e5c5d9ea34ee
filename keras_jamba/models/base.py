"""The base class of all models."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

import keras

from keras_jamba import _keras_internals
from keras_jamba._typing import Config, PathLike, Shape, Tensor, Tensors
from keras_jamba.layers import lora
from keras_jamba.layers._quantizable import quantizable_layers
from keras_jamba.layers.quantization import QUANTIZATIONS, float_shapes, quantize
from keras_jamba.models import _adapters, _saved_state
from keras_jamba.models._keras_files import KerasFiles
from keras_jamba.models._routing_metrics import routing_metrics, update_routing_metrics
from keras_jamba.models._trained_model import TrainedModel


class JambaModel(TrainedModel, KerasFiles):
    """The abstract base of all models; a model derives from this class and `keras.Model`, in this order.

    `keras.Model` is not a base here: in the bases of a functional model, Keras replaces it by `Functional`.

    A model sets `_config` and `block_pattern` in its constructor, then calls `_add_routing_metrics`.

    Attributes:
        _config: a dict of the constructor arguments without name and dtype.
        block_pattern: a tuple of `(mixer, feed_forward)` per block; see `models._pattern`.
        optimizer: the optimizer of `compile`, or None.
        sampler: the sampler of `compile`; only language models have it.
    """

    _config: Config
    block_pattern: tuple[tuple[str, str | None], ...]
    _moe_metrics: dict[str, keras.metrics.Metric]
    # Keras sets the attribute only in `compile`.
    optimizer: Any = None
    # Arguments of `compile`: Keras keeps only the resolved jit_compile, and no auto_scale_loss.
    _given_jit_compile: bool | Literal["auto"] = "auto"
    _given_auto_scale_loss = True
    # The backend for which a loaded model was given an explicit jit_compile.
    _loaded_compiled_on: str | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        model = super().__new__(cls, *args, **kwargs)
        # Keras replaces the method on every instance by a check of its own modes.
        vars(model).pop("quantize", None)
        return model

    # Configuration

    def get_config(self) -> Config:
        """Returns the constructor arguments, and any adapters, frozen layers and variables, and sampler."""
        # Serialized anew: objects read from a file have an id that is valid only in that file.
        policy = keras.dtype_policies.serialize(self.dtype_policy)
        state = _saved_state.state_of(self, self._given_jit_compile)
        return {**self._config, "dtype": policy, "name": self.name, **state}

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """Builds a model with new weights from the result of `get_config`.

        Adapters, frozen layers and variables, and the sampler are restored. A config has no tokenizer or other files:
        `.keras` files, pickle and `copy.deepcopy` include them. `keras.models.clone_model` does the same as this
        method, except for `DHCJamba`: Keras clones a functional model as a plain functional model.
        """
        arguments, state = _saved_state.split_state(config)
        model = cls(**arguments)
        _saved_state.apply_state(model, state)
        model._loaded_compiled_on = state.get("compiled_on")
        return model

    def constructor_arguments(self) -> Config:
        """Returns the constructor arguments without name and dtype."""
        return dict(self._config)

    # Compilation

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool | Literal["auto"] = "auto",
        auto_scale_loss: bool = True,
    ) -> None:
        """Configures training like `keras.Model.compile`.

        A loaded model resolves `jit_compile="auto"` anew. True and False are kept on the same backend, and become
        "auto" on another backend.

        Raises:
            ValueError: if the model returns logits, for a loss or a metric that expects probabilities.
        """
        self._check_compile(loss, metrics, weighted_metrics)
        super().compile(
            optimizer=optimizer,
            loss=loss,
            loss_weights=loss_weights,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
            auto_scale_loss=auto_scale_loss,
        )
        self._given_jit_compile, self._given_auto_scale_loss = jit_compile, auto_scale_loss

    def _check_compile(self, loss, metrics, weighted_metrics):
        """Raises ValueError for a loss or a metric that does not fit the outputs; the base accepts all."""

    def get_compile_config(self) -> Config | None:
        config = super().get_compile_config()
        if not config:
            return config
        given = {"jit_compile": self._given_jit_compile}
        given |= {} if self._given_auto_scale_loss else {"auto_scale_loss": False}
        if hasattr(self, "sampler"):
            given["sampler"] = _saved_state.serialized_sampler(self.sampler) or "auto"
        return config | given

    def compile_from_config(self, config: Config) -> None:
        config = keras.saving.deserialize_keras_object(config)
        # Files of earlier versions hold the resolved value of "auto", and no name of the backend.
        if not _saved_state.is_this_backend(self._loaded_compiled_on):
            config["jit_compile"] = "auto"
        self.compile(**config)
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    # Quantization and adapters

    def quantize(
        self, mode: Literal["int8", "int4", "experts_int8"], config: None = None, filters: None = None
    ) -> None:
        """Quantizes the stored weights.

        `from_preset(..., quantization=mode)` quantizes each weight as it loads, and never holds all of them
        unquantized.

        Args:
            mode: "int8", "int4" or "experts_int8"; `keras_jamba.layers.quantize` lists the weights of each mode.
            config, filters: must be None.

        Raises:
            ValueError: for another mode, for a config or filters, and for weights that are quantized already.

        Example:
            >>> import keras_jamba
            >>> model = keras_jamba.DHCJamba.from_preset("digits")
            >>> model.quantize("int8")
        """
        if config is not None or filters is not None:
            raise ValueError(
                f"quantize takes only a mode. Received: config={config!r}, filters={filters!r}. Leave both out."
            )
        quantize(self, mode)
        for model in (self, *self._inner_models()):
            model._config["quantization"] = mode
        self._reset_functions_and_optimizer()

    def enable_lora(
        self,
        rank: int,
        targets: str | Iterable[str] | None = None,
        lora_alpha: float | None = None,
        also_train: str | Iterable[str] = (),
    ) -> dict[str, float]:
        """Adds low-rank adapters to projections of the model, and freezes all other weights.

        `keras_jamba.layers.enable_lora` describes the arguments, the returned counts and the errors. The optimizer
        restarts.

        Example:
            >>> import keras_jamba
            >>> model = keras_jamba.DHCJamba.from_preset("digits")
            >>> share = model.enable_lora(4, also_train="head")["share"]
            Adapters of rank 4 beside 8 matrices: 4,482 of 134,143 weights are trained, 3.34%.
        """
        found = lora.enable_lora(self, rank, targets, lora_alpha, also_train)
        self._reset_functions_and_optimizer()
        return found

    def merge_lora(self) -> None:
        """Adds all adapters to their matrices, removes them, and makes all weights trainable.

        Raises:
            ValueError: if the model has no adapters.
        """
        lora.merge_lora(self)
        self._reset_functions_and_optimizer()

    def save_lora(self, file: PathLike) -> None:
        """Writes the adapters and the fully trained variables to a safetensors file.

        The file appears completely or not at all, and replaces an older file of this name.

        Raises:
            ValueError: if the model has no adapters, or a value is not finite.
        """
        _adapters.save(self, file)

    @_keras_internals.restored_scopes()
    def load_lora(self, source: PathLike) -> None:
        """Loads the file of `save_lora` for a model of the same sizes; adapters are added if the model has none.

        Args:
            source: the file; or a PEFT folder with `adapter_config.json` and `adapter_model.safetensors`, for models
                that transformers has too.

        Raises:
            ValueError: if the file is damaged, or of another model or other adapters. The model is not changed then.
        """
        _adapters.check_is_path(source)
        if Path(source).is_dir():
            self._load_peft(source)
        else:
            _adapters.load(self, source)
        self._reset_functions_and_optimizer()

    def save(self, filepath: PathLike, overwrite: bool = True, zipped: bool | None = None, **kwargs: Any) -> None:
        """Saves the model like `keras.Model.save`.

        The file includes adapters and the trainable state, and of text models the tokenizer, sampler and
        generation_config. A `.keras` file appears completely or not at all, except on remote paths and with
        `overwrite=False`.

        Raises:
            ValueError: before the file is opened, for a model that a file cannot restore: a quantization other than in
                the configuration, or a tokenizer or sampler that cannot be saved.
        """
        self._check_can_be_saved()
        super().save(filepath, overwrite, zipped, **kwargs)

    def _check_can_be_saved(self):
        """Raises ValueError for a model that a `.keras` file cannot restore."""
        self._check_quantization_matches_config()
        self.get_config()
        self.get_compile_config()

    def get_build_config(self) -> Config | None:
        # Keras calls this method whenever it saves a model, also inside another model.
        self._check_quantization_matches_config()
        return super().get_build_config()

    def _check_has_no_adapters(self):
        """Raises ValueError for a model with adapters."""
        if any(lora.is_adapter(v) for v in self.weights):
            raise ValueError(
                "Presets and checkpoints of transformers hold a model without adapters. Received: a model with "
                "adapters. Call merge_lora first, save_lora for the adapters alone, or model.save('model.keras') for "
                "both."
            )

    def _check_quantization_matches_config(self):
        """Raises ValueError if a layer's quantization differs from the configuration, which rebuilds the model."""
        mode = self._config["quantization"]
        for _, layer in quantizable_layers(self):
            expected = QUANTIZATIONS.get(mode, {}).get(None if layer.keeps_float else layer.KIND)
            if layer.quantization_mode != expected:
                raise ValueError(
                    f"Weights must be quantized as the configuration says. Received: quantization={mode!r}, and "
                    f"{layer.path!r} in {layer.quantization_mode or 'floating point'}. Call quantize of the "
                    "model, which updates the configuration."
                )

    def float_shapes(self) -> dict[str, Shape]:
        """Returns `{path: shape}` of the weights as in floating point and without adapters."""
        return float_shapes(self)

    def _load_peft(self, folder):
        raise ValueError(
            f"Only models that transformers has can load adapters of PEFT. Received: {str(folder)!r}, a folder, and a "
            f"{type(self).__name__}. Pass a file that save_lora wrote."
        )

    def _inner_models(self):
        inner = _keras_internals.sublayers(self, include_self=False)
        return [layer for layer in inner if isinstance(layer, JambaModel)]

    def _reset_functions_and_optimizer(self):
        """Drops compiled functions and rebuilds the optimizer: both refer to the replaced variables."""
        self.train_function = self.test_function = self.predict_function = None
        if self.optimizer is not None and self.optimizer.built:
            self.optimizer = keras.optimizers.deserialize(keras.optimizers.serialize(self.optimizer))

    # Training

    def _add_routing_metrics(self):
        """Creates the metrics of expert layers; call it after the layers exist."""
        self._moe_metrics = routing_metrics(self)

    def compute_loss(
        self,
        x: Tensors | None = None,
        y: Tensors | None = None,
        y_pred: Tensors | None = None,
        sample_weight: Tensors | None = None,
        training: bool = True,
    ) -> Tensor:
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        update_routing_metrics(self, self._moe_metrics)
        return loss
