"""Figures of the image classification example."""

import matplotlib.pyplot as plt
import numpy as np


def draw_learning_curve(history, file):
    """Draws losses, accuracy and the entropy of the experts per epoch, where the history has them."""
    titles = {
        "loss": "loss, auxiliary losses included",
        "accuracy": "training accuracy",
        "moe_entropy": "entropy of the experts' shares",
    }
    titles = {name: title for name, title in titles.items() if name in history}
    figure, axes = plt.subplots(1, len(titles), figsize=(4 * len(titles), 3.4), layout="constrained")
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.plot(np.arange(1, len(history[name]) + 1), history[name])
        axis.set(xlabel="epoch", title=title)
        axis.grid(alpha=0.3)
    _write(figure, file)


def draw_confusion_matrix(data, predicted, file):
    """Draws the confusion matrix and up to 18 wrongly classified images."""
    count = len(data.classes)
    matrix = np.zeros((count, count), int)
    np.add.at(matrix, (data.test_labels, predicted), 1)
    figure = plt.figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    axis = left.subplots()
    axis.imshow(np.log1p(matrix), cmap="Blues")
    if count <= 20:
        for i, j in np.ndindex(count, count):
            if matrix[i, j]:
                dark = np.log1p(matrix[i, j]) > np.log1p(matrix.max()) / 2
                axis.text(j, i, matrix[i, j], ha="center", va="center", color="w" if dark else "k")
        axis.set_xticks(range(count), data.classes, rotation=90 if max(map(len, data.classes)) > 3 else 0)
        axis.set_yticks(range(count), data.classes)
    axis.set(xlabel="predicted", ylabel="true", title="test images (shade: logarithm)")
    mistakes = np.flatnonzero(predicted != data.test_labels)
    right.suptitle(f"{len(mistakes)} of {len(predicted)} wrong: true, predicted")
    for axis, i in zip(right.subplots(3, 6).flat, mistakes[:18], strict=False):
        image = data.test_images[i]
        axis.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray_r")
        axis.set_title(f"{data.classes[data.test_labels[i]]},\n{data.classes[predicted[i]]}", fontsize=9)
    for axis in right.axes:
        axis.axis("off")
    _write(figure, file)


def draw_expert_usage(model, file):
    """Draws the share of tokens per expert in the last batch of test images, one row per layer."""
    layers = {
        f"block {i}": block.feed_forward
        for i, block in enumerate(model.backbone.blocks)
        if hasattr(block.feed_forward, "usage")
    }
    figure, axis = plt.subplots(figsize=(8, 1 + 0.6 * len(layers)), layout="constrained")
    shares = np.array([np.asarray(layer.usage.numpy()) for layer in layers.values()])
    drawn = axis.imshow(100 * shares, cmap="viridis", vmin=0, aspect="auto")
    axis.set_yticks(range(len(layers)), list(layers))
    axis.set_xticks(range(shares.shape[1]), [f"expert {i}" for i in range(shares.shape[1])])
    figure.colorbar(drawn, label="% of assignments")
    axis.set_title(f"balanced: {100 / shares.shape[1]:.1f} % each")
    _write(figure, file)


def _write(figure, file):
    figure.savefig(file, dpi=110)
    plt.close(figure)
