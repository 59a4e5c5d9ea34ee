"""What of a model its constructor arguments do not say, in its config and its compile config."""

import keras

from keras_jamba import _backend
from keras_jamba.generation.samplers import ProbabilitySampler, sampler_of
from keras_jamba.layers._compact import compact_layers
from keras_jamba.layers._trainable import apply_trainable_state, trainable_state

# Beside the constructor arguments in a config, where there is something to say.
_STATE = ("adapters", "trainable_state", "sampler", "compiled_on")


class SavedState:
    """A model that comes back from its config as it was: with its adapters, frozen parts, sampler and `compile`.

    This holds for `.keras` files, pickle, `copy.deepcopy` and `from_config(get_config())`, whose weights are new. The
    functional `DHCJamba` is no exception, but `keras.models.clone_model` makes a plain functional model of it.

    A subclass has `_config`, its constructor arguments.
    """

    # Keras sets it in `compile` alone.
    optimizer = None
    # What `compile` was given. Keras notes what it made of them, which holds for one backend.
    _given_jit_compile, _given_auto_scale_loss = "auto", True
    # The backend of the process that wrote the config.
    _loaded_compiled_on = None

    # Configuration

    def get_config(self):
        """The constructor arguments; what is frozen, adapters and what else `from_config` restores stands beside them
        where there is any."""
        found = {
            "adapters": {
                path: [layer.lora_rank, layer.lora_alpha] for path, layer in compact_layers(self) if layer.lora_enabled
            },
            "trainable_state": trainable_state(self),
            "sampler": None if self.compiled else serialized_sampler(getattr(self, "sampler", None)),
            "compiled_on": _backend.name if self.compiled and self._given_jit_compile != "auto" else None,
        }
        # In a file Keras numbers a policy that stands there twice: what was read of one is not for another.
        policy = keras.dtype_policies.serialize(self.dtype_policy)
        state = {kind: x for kind, x in found.items() if x}
        return {**self._config, "dtype": policy, "name": self.name, **state}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        state = {kind: config.pop(kind) for kind in _STATE if kind in config}
        model = cls(**config)
        layers = dict(compact_layers(model)) if "adapters" in state else {}
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
        """Keras' own. A loaded model decides `jit_compile="auto"` anew; True and False hold on the same backend."""
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
        # Files of earlier versions hold what "auto" was on a backend that they do not name.
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
