"""Classifies a stream of frames with ONNX Runtime and NumPy only.

Export a stream once, on PyTorch, then run this script anywhere:

    KERAS_BACKEND=torch python -c "import keras_jamba as k; k.export(
        k.DHCJamba.from_preset('video_direction'), 'direction.onnx', 'onnx', streaming=True, capacity=64)"
    python examples/onnx_stream.py direction.onnx
"""

import argparse
import time

import numpy as np
import onnxruntime

DTYPES = {"tensor(float)": "float32", "tensor(int32)": "int32", "tensor(bool)": "bool"}


def empty_inputs(session, rows=1):
    """Returns zeros for every input; the first axis is the number of streams."""
    return {x.name: np.zeros([rows, *x.shape[1:]], DTYPES[x.type]) for x in session.get_inputs()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="a stream that keras_jamba.export wrote")
    parser.add_argument("--frames", type=int, default=24)
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(args.file)
    outputs = [x.name for x in session.get_outputs()]
    inputs = empty_inputs(session)
    _, height, width, _ = inputs["frame"].shape
    started = time.perf_counter()
    for i in range(args.frames):
        # A bright square that moves to the right.
        inputs["frame"][:] = 0
        left = i * (width - 4) // args.frames
        inputs["frame"][:, height // 2 - 2 : height // 2 + 2, left : left + 4] = 1
        inputs["reset"][:] = i == 0
        found = dict(zip(outputs, session.run(outputs, inputs), strict=True))
        inputs |= {name.removeprefix("next_"): x for name, x in found.items() if name.startswith("next_")}
        logits = found["logits"][0]
        print(f"frame {i + 1}: class {logits.argmax()}, logits {' '.join(f'{x:.1f}' for x in logits)}")
    print(f"{args.frames / (time.perf_counter() - started):.0f} frames per second")


if __name__ == "__main__":
    main()
