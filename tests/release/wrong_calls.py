"""Calls functions of `keras_jamba.ops` with one argument that is wrong: `python wrong_calls.py SEED COUNT FILE`.

Each call gives a result or an error in the form of the project. Other strides give the result of contiguous arrays. A
line of JSON is written to FILE before a call, so that a signal leaves its description, and after it.
"""

import json
import sys

import keras
import numpy as np

from keras_jamba import ops

B, T, D, N, H = 2, 5, 4, 3, 2


def normal(rng, *shape):
    return rng.standard_normal(shape).astype("float32")


def scan(rng):
    u, delta, z = (normal(rng, B, T, D) for _ in range(3))
    arrays = dict(u=u, delta=delta, A=-np.exp(normal(rng, D, N)), B=normal(rng, B, T, N), C=normal(rng, B, T, N))
    arrays |= dict(D=normal(rng, D), z=z, delta_bias=normal(rng, D), initial_state=normal(rng, B, D, N))
    return ops.selective_scan, arrays | marks(rng), dict(delta_softplus=True)


def convolution(rng):
    arrays = dict(x=normal(rng, B, T, D), kernel=normal(rng, 3, D), bias=normal(rng, D))
    return ops.causal_depthwise_conv, arrays | dict(initial_state=normal(rng, B, 2, D)) | marks(rng), {}


def experts(rng):
    x, s, k, f = 3, B * T, 2, 6
    arrays = dict(tokens=normal(rng, s, D), weights=normal(rng, s, k))
    arrays |= dict(indices=rng.integers(0, x, (s, k)).astype("int32"), up_bank=normal(rng, x, D, f))
    return ops.expert_mlp, arrays | dict(down_bank=normal(rng, x, f, D), gate_bank=normal(rng, x, D, f)), {}


def attention(rng):
    arrays = dict(query=normal(rng, B, T, H, D), key=normal(rng, B, T, 1, D), value=normal(rng, B, T, 1, D))
    return ops.grouped_query_attention, arrays, dict(causal=True)


def marks(rng):
    return dict(mask=rng.random((B, T)) > 0.3, segment_ids=np.sort(rng.integers(0, 3, (B, T)), axis=1).astype("int32"))


def other_strides(x):
    """Returns equal values in other places of memory: a transposed, a reversed or a sliced array."""
    wide = np.zeros((*x.shape, 2), x.dtype)
    wide[..., 1] = x
    return [np.asfortranarray(x), np.ascontiguousarray(x[::-1])[::-1], wide[..., 1]]


def wrong(x, rng):
    """Returns a wrong argument in place of an array."""
    axis = rng.integers(x.ndim)
    found = [None, 0, 1.5, "a", b"a", [], [[1.0], [1.0, 2.0]], {}, object(), np.float64("nan"), x[..., None], x[0]]
    found += [np.take(x, [], axis), np.concatenate([x, x], axis), np.delete(x, 0, axis), np.full(x.shape, "a")]
    found += [x.astype(t) for t in ("float64", "float16", "int8", "int64", "uint64", "bool", "complex64", "object")]
    found += [np.zeros((0,) * x.ndim, x.dtype), np.broadcast_to(x, (3, *x.shape)), x.T, x.ravel(), x[:0]]
    extreme = np.float32("inf") if x.dtype.kind == "f" else np.iinfo("int32").min
    found += [np.full(x.shape, extreme, "float32" if x.dtype.kind == "f" else "int32")]
    return found[rng.integers(len(found))]


def main(seed, count, file):
    rng = np.random.default_rng(int(seed))
    with open(file, "a", buffering=1) as report:
        for number in range(int(count)):
            make = (scan, convolution, experts, attention)[rng.integers(4)]
            function, arrays, options = make(rng)
            name = sorted(arrays)[rng.integers(len(arrays))]
            described = f"{function.__name__}, {name}"
            if rng.random() < 0.2:
                expected = numbers(function(**arrays, **options))
                value = other_strides(arrays[name])[rng.integers(3)]
                print(json.dumps({"begins": number, "what": f"{described} with strides {value.strides}"}), file=report)
                good = np.allclose(numbers(function(**arrays | {name: value}, **options)), expected, 1e-5, 1e-6)
                end = "same" if good else "FAULT: other numbers"
            else:
                value = wrong(arrays[name], rng)
                what = f"{described} as {described_value(value)}"
                print(json.dumps({"begins": number, "what": what}), file=report)
                end = end_of(function, arrays | {name: value}, options) if is_tensor(value) else "no tensor"
            print(json.dumps({"ended": number, "end": end}), file=report)


def described_value(value):
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else repr(value)[:40]


def numbers(x):
    return np.asarray(keras.ops.convert_to_numpy(x))


def end_of(function, arrays, options):
    try:
        numbers(function(**arrays, **options))
    except ValueError as error:
        return "refused" if "Received: " in str(error) else f"FAULT: a raw ValueError: {error}"[:300]
    except Exception as error:
        return f"FAULT: a raw {type(error).__name__}: {error}"[:300]
    return "result"


def is_tensor(value):
    """Returns whether Keras makes a tensor of a value. What it says of others is its own."""
    try:
        return value is None or keras.ops.convert_to_tensor(value) is not None
    except Exception:
        return False


if __name__ == "__main__":
    main(*sys.argv[1:])
