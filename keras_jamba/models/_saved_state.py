"""What configs of models hold beside the constructor arguments, and the state of `compile`."""

import keras

from keras_jamba import _backend
from keras_jamba.generation.samplers import ProbabilitySampler, sampler_of
from keras_jamba.layers._quantizable import quantizable_layers
from keras_jamba.layers._trainable import apply_trainable_state, trainable_state

# Beside the constructor arguments in a config, where there is something to say.
_STATE = ("adapters", "trainable_state", "sampler", "compiled_on")


class SavedState:
    """A model whose config holds adapters, frozen layers and variables, and the sampler, and that compiles as before.

    A subclass has `_config`, its constructor arguments.
    """

    # Keras sets the attribute in `compile` only.
    optimizer = None
    # The arguments of `compile`. Keras stores jit_compile as this backend resolves it, and no auto_scale_loss.
    _given_jit_compile, _given_auto_scale_loss = "auto", True
    # The backend for which a loaded model was given an explicit jit_compile.
    _loaded_compiled_on = None

    # Configuration

    def get_config(self):
        """The constructor arguments; and adapters, frozen parts and the sampler, where the model has any."""
        found = {
            "adapters": {
                path: [layer.lora_rank, layer.lora_alpha]
                for path, layer in quantizable_layers(self)
                if layer.lora_enabled
            },
            "trainable_state": trainable_state(self),
            "sampler": serialized_sampler(getattr(self, "sampler", None)),
            "compiled_on": _backend.name if self.compiled and self._given_jit_compile != "auto" else None,
        }
        # Not as it was read: Keras adds an id to objects in a file, which is not valid in another file.
        policy = keras.dtype_policies.serialize(self.dtype_policy)
        state = {kind: x for kind, x in found.items() if x}
        return {**self._config, "dtype": policy, "name": self.name, **state}

    @classmethod
    def from_config(cls, config):
        """Builds a model from what `get_config` returned, with new weights.

        Adapters, frozen layers and variables, and the sampler are as they were. Files beside the weights, such as the
        tokenizer, come with `.keras` files, pickle and `copy.deepcopy`, not with a config. `keras.models.clone_model`
        does the same, but for `DHCJamba`: Keras builds a plain functional model from the layers of a functional one.
        """
        config = dict(config)
        state = {kind: config.pop(kind) for kind in _STATE if kind in config}
        model = cls(**config)
        layers = dict(quantizable_layers(model)) if "adapters" in state else {}
        for path, (rank, lora_alpha) in state.get("adapters", {}).items():
            layers[path].enable_lora(rank, lora_alpha)
        if "trainable_state" in state:
            apply_trainable_state(model, state["trainable_state"])
        if "sampler" in state:
            model.sampler = sampler_of(keras.saving.deserialize_keras_object(state["sampler"]))
        model._loaded_compiled_on = state.get("compiled_on")
        return model

    def constructor_arguments(self):
        """The constructor arguments, without name and dtype."""
        return {name: value for name, value in self._config.items() if name not in ("name", "dtype")}

    # Compilation

    def compile(
        self,
        optimizer="rmsprop",
        loss=None,
        loss_weights=None,
        metrics=None,
        weighted_metrics=None,
        run_eagerly=False,
        steps_per_execution=1,
        jit_compile="auto",
        auto_scale_loss=True,
    ):
        """Keras' own. A saved model resolves `jit_compile="auto"` where it is loaded; True and False are kept on the
        same backend, and become "auto" on another."""
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

    def get_compile_config(self):
        config = super().get_compile_config()
        if not config:
            return config
        given = {"jit_compile": self._given_jit_compile}
        given |= {} if self._given_auto_scale_loss else {"auto_scale_loss": False}
        if hasattr(self, "sampler"):
            given["sampler"] = serialized_sampler(self.sampler) or "auto"
        return config | given

    def compile_from_config(self, config):
        config = keras.saving.deserialize_keras_object(config)
        # Files of earlier versions hold what "auto" was resolved to, and do not name the backend.
        if self._loaded_compiled_on != _backend.name:
            config["jit_compile"] = "auto"
        self.compile(**config)
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)


def serialized_sampler(sampler):
    """A sampler as plain data; None for None.

    Raises:
        ValueError: for a sampler without a config.
    """
    if sampler is None or isinstance(sampler, str):
        return sampler
    inner = sampler.sampler if isinstance(sampler, ProbabilitySampler) else sampler
    if not hasattr(inner, "get_config"):
        raise ValueError(
            "A sampler is saved by its get_config. Received: a model whose sampler is a "
            f"{type(inner).__name__} without one. Add get_config and from_config to it and register it by "
            "keras.saving.register_keras_serializable, or compile the model with another sampler and pass this one to "
            "generate."
        )
    return keras.saving.serialize_keras_object(inner)
