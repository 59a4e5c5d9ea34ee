"""Interrupts of calls at a chosen line or moment, and checks that the model is usable afterwards."""

import functools
import gc
import os
import signal
import sys
import threading
import warnings

import keras
import numpy as np
from keras.src.backend.common import global_state

import keras_jamba
from keras_jamba import training

SIZES = dict(d_model=8, num_layers=2, mamba_ratio=1, num_heads=2, dt_rank=1, num_experts=2, moe_offset=0)
IDS = np.random.default_rng(0).integers(0, 11, (8, 6)).astype("int32")


def language_model():
    keras.utils.set_random_seed(0)
    return keras_jamba.JambaCausalLM(vocab_size=11, **SIZES)


def compiled_model(**given):
    model = language_model()
    model.compile(keras.optimizers.Adam(1e-3), **given)
    model.optimizer.build(model.trainable_variables)
    return model


def batches(workers=1):
    return training.Batches((IDS[:4], IDS[:4]), batch_size=2, shuffle=True, workers=workers)


def at_line(call, files, wanted, kind=KeyboardInterrupt):
    """Runs `call` and raises `kind` at the `wanted`-th distinct line of `files` that it reaches.

    Returns:
        `(lines, error)`: the lines reached, as `(file, number)`, the last of which is that of the interrupt unless
        there are fewer; and the error that ended the call, or None.
    """
    seen = {}

    def local(frame, event, argument):
        place = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and place not in seen:
            seen[place] = True
            if len(seen) == wanted + 1:
                sys.settrace(None)
                raise kind
        return local

    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename.endswith(files) else None)
    error = None
    try:
        call()
    except BaseException as raised:
        error = raised.with_traceback(None)
    finally:
        sys.settrace(None)
    return list(seen), error


def at_moment(call, seconds, number=signal.SIGALRM):
    """Runs `call` and raises a signal after a time. Returns the exception's type that ended it, or None."""
    sent = threading.Timer(seconds, signal.raise_signal, [number]) if number != signal.SIGALRM else None
    try:
        try:
            if sent is None:
                signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
            else:
                sent.start()
            call()
        finally:
            if sent is None:
                signal.setitimer(signal.ITIMER_REAL, 0)
            else:
                sent.cancel()
                sent.join()
    except (KeyboardInterrupt, SystemExit) as ended:
        return type(ended)
    except (SystemError, TypeError) as ended:
        # TensorFlow turns an interrupt inside its C code into one of these.
        if keras.backend.backend() != "tensorflow":
            raise
        return type(ended)
    return None


def process_state():
    """Returns what a call must leave as it was: environment, filters of warnings, and scopes of Keras."""
    keras_state = {
        name: [] if isinstance(value, list | dict) and not value else str(value)[:200]
        for name, value in vars(global_state.GLOBAL_STATE_TRACKER).items()
        if value is not None and "scope" in name or name == "training"
    }
    keras_state = {name: value for name, value in keras_state.items() if value}
    found = {
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "keras": keras_state,
        "collects": gc.isenabled(),
        "dtype": keras.config.floatx(),
        "policy": keras.config.dtype_policy().name,
    }
    if keras.backend.backend() == "torch":
        import torch

        found |= {"gradients": torch.is_grad_enabled(), "inference": torch.is_inference_mode_enabled()}
    return found


@functools.cache
def _fresh():
    return language_model()


def problems(model, before, fits=True):
    """Returns sentences on a model that is not usable; `before` is an earlier `process_state()`."""
    found = [f"changed: {name}, {str(value)[:200]}" for name, value in process_state().items() if value != before[name]]
    if model._loops.lock.locked():
        return [*found, "a lock is held"]
    try:
        values = [np.array(keras.ops.convert_to_numpy(v)) for v in (*model.variables, *model.optimizer.variables)]
    except Exception as error:
        return [*found, f"variables cannot be read: {error!r:.100}"]
    if not all(np.isfinite(x).all() for x in values if x.dtype.kind == "f"):
        found.append("weights are not finite")
    try:
        fresh = _fresh()
        fresh.set_weights(model.get_weights())
        ours, theirs = model.predict(IDS, verbose=0), fresh.predict(IDS, verbose=0)
        # TensorFlow compiles the steps of a compiled model only.
        if not np.allclose(ours, theirs, rtol=1e-5, atol=1e-6):
            found.append(f"predict differs by {np.abs(ours - theirs).max()}")
        if list(model.generate([1, 2], max_new_tokens=3)) != list(fresh.generate([1, 2], max_new_tokens=3)):
            found.append("generate differs")
        if fits:
            steps = int(keras.ops.convert_to_numpy(model.optimizer.iterations))
            history = model.fit(batches(), epochs=1, verbose=0)
            now = int(keras.ops.convert_to_numpy(model.optimizer.iterations))
            if len(history.epoch) != 1 or now != steps + 2 or not np.isfinite(history.history["loss"]).all():
                found.append(f"fit: epochs {history.epoch}, steps {steps} to {now}, {history.history}")
    except Exception as error:
        found.append(f"unusable: {type(error).__name__}: {str(error)[:200]}")
    return found + _left_by_loops(model)


def _left_by_loops(model):
    """Returns sentences on loops that have not ended. A loop ends those that an interrupt ended between two lines."""
    found, loops = [], model._loops
    if loops.running or loops.owners or loops.inside_step:
        found.append(f"loops left: {loops.running}, {loops.owners}, {loops.inside_step}")
    if keras.backend.backend() == "jax":
        from keras_jamba._backend.jax import _loops

        gc.collect()
        if _loops._training or len(_loops._readers) or _loops._lock.locked():
            found.append(f"JAX: {len(_loops._training)} loops, {len(_loops._readers)} readers, {_loops._lock.locked()}")
    return found
