"""Visualizations, compared with finite differences, brute force and formulas. The model stays unchanged."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
from checks import close, full, gradients, numpy
from keras import ops

import keras_jamba
from keras_jamba import visualize
from keras_jamba.layers import AttentionLayer

TINY = dict(num_classes=3, d_model=8, num_layers=2, mamba_ratio=1, num_heads=2, num_experts=4, downsample=2)
KINDS = {
    "grid": dict(image_shape=(6, 6, 1), scan_order="snake", direction="bidirectional"),
    "frames": dict(image_shape=(3, 6, 6, 3), tokens="frames", stem="patchify", moe_frequency=0),
    "grid+frames": dict(
        image_shape=(None, 6, 6, 1), tokens="grid+frames", stem="patchify", attention_window=4, moe_frequency=0
    ),
}
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.random((3, 6, 6, 1), "float32")


def model_of(**options):
    return keras_jamba.DHCJamba(**{"image_shape": (6, 6, 1)} | TINY | options)


@pytest.fixture(scope="module")
def plain():
    return model_of()


def some_images(model, count=2):
    return RANDOM.random((count, *(side or 3 for side in model.input_shape[1:])), "float32")


def softmax(logits):
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


@full("jax", "tensorflow")
def test_saliency_is_the_gradient_of_the_logit():
    model = model_of(moe_frequency=0)
    maps = visualize.saliency(model, IMAGES, classes=[2, 0, 1], batch_size=2)
    assert maps.shape == (3, 6, 6) and maps.dtype == "float32"
    for pixel in ((0, 0), (2, 3), (5, 5)):
        step = np.zeros_like(IMAGES)
        step[:, *pixel] = 1e-3
        slopes = (numpy(model(IMAGES + step)) - numpy(model(IMAGES - step))) / 2e-3
        close(maps[:, *pixel], np.abs(slopes[range(3), [2, 0, 1]]), relative=0.02, absolute=3e-3)


@full("jax", "tensorflow")
def test_the_predicted_class_is_the_default():
    model = model_of(stem="patchify", mamba_ratio=None)
    predicted = numpy(model(IMAGES)).argmax(-1)
    close(visualize.saliency(model, IMAGES), visualize.saliency(model, IMAGES, predicted))


@full("jax")
def test_smoothing_is_the_mean_of_gradients_at_noisy_copies():
    model = model_of(stem="patchify", image_shape=(6, 6, 3), moe_frequency=0, pixel_range=None)
    (image,) = some_images(model, 1)
    smooth = visualize.saliency(model, image[None], 1, samples=4, noise=0.2, seed=3)
    random = np.random.default_rng(3)
    copies = [image + 0.2 * np.ptp(image) * random.standard_normal((1, 6, 6, 3), "float32") for _ in range(4)]
    (slopes,) = gradients(lambda x: ops.sum(model(x)[:, 1]), [np.concatenate(copies)])
    close(smooth[0], np.abs(slopes.mean(axis=0)).sum(-1), absolute=1e-5)


@full("jax", "tensorflow")
@pytest.mark.parametrize("score", ["probability", "logit"])
def test_occlusion_is_the_mean_drop_over_the_windows_that_hold_a_pixel(score):
    model = model_of()
    images = IMAGES[:2]
    scores = lambda x: (softmax if score == "probability" else np.asarray)(numpy(model(x)))[:, 2]  # noqa: E731
    maps = visualize.occlusion(model, images, (3, 2), 2, classes=2, fill=0.5, score=score, batch_size=5)
    windows = [np.s_[:, top : top + 3, left : left + 2] for top in (0, 2, 3) for left in (0, 2, 4)]
    filled = np.stack([images] * 10)
    for copy, window in zip(filled, windows, strict=False):
        copy[window] = 0.5
    filled_scores = scores(filled.reshape(20, 6, 6, 1)).reshape(10, 2)
    total, count = np.zeros((2, 6, 6)), np.zeros((2, 6, 6))
    for window, after in zip(windows, filled_scores, strict=False):
        total[window] += (filled_scores[-1] - after)[:, None, None]
        count[window] += 1
    close(maps, total / count, relative=1e-3, absolute=1e-5)


@full("jax", "tensorflow")
@pytest.mark.parametrize("tokens", ["frames", "grid+frames"])
def test_occlusion_of_clips_fills_one_window_or_one_frame_at_a_time(tokens):
    model = model_of(**KINDS[tokens])
    clips = some_images(model)
    colours, before = clips.mean(axis=(1, 2, 3)), numpy(model(clips))
    classes = before.argmax(-1)
    windows = visualize.occlusion(model, clips, 3, score="logit")
    importance = visualize.frame_importance(model, clips, score="logit")
    assert windows.shape == clips.shape[:-1] and importance.shape == (2, 3)
    for frame in range(3):
        for found, place in ((importance[:, frame], np.s_[:]), (windows[:, frame, 5, 0], np.s_[3:, :3])):
            filled = clips.copy()
            for clip, colour in zip(filled, colours, strict=True):
                clip[frame][place] = colour
            close(found, (before - numpy(model(filled)))[range(2), classes], relative=1e-3, absolute=1e-5)


@full("jax", "tensorflow")
def test_the_receptive_field_of_an_unmixed_token_matches_its_formula():
    model = model_of(stem="patchify", image_shape=(6, 6, 2), scan_order="snake", moe_frequency=0)
    for block in model.backbone.blocks:  # zero projections leave only norms after the encoder
        for kernel in (block.mixer.out_proj.kernel, block.feed_forward.down_proj.kernel):
            kernel.assign(np.zeros(kernel.shape))
    images = some_images(model, 3)
    field = visualize.receptive_field(model, images, token=3, batch_size=2)
    kernel, bias = (numpy(v) for v in model.encoder.projection.weights)
    patches = images[:, 2:4, 4:6].reshape(3, -1)  # token 3 of a snake: row 1, column 2
    features = patches @ kernel.reshape(-1, 8) + bias

    def output_sum(features):
        for _ in range(2):
            features = features / np.sqrt((features**2).mean(-1, keepdims=True) + 1e-6)
        return features.sum(-1)

    slopes = [(output_sum(features + 1e-5 * d) - output_sum(features - 1e-5 * d)) / 2e-5 for d in np.eye(8)]
    expected = np.zeros((6, 6))
    pixels = np.abs(np.stack(slopes, -1) @ kernel.reshape(-1, 8).T).reshape(3, 2, 2, 2)
    expected[2:4, 4:6] = pixels.sum(-1).mean(0)
    close(field, expected / expected.max(), relative=1e-2, absolute=1e-4)


@full("jax", "tensorflow")
def test_a_causal_token_has_no_receptive_field_in_later_tokens():
    images = IMAGES[:1]
    for direction in ("causal", "bidirectional"):
        model = model_of(stem="patchify", direction=direction)
        field = visualize.receptive_field(model, images, token=4)  # row 1, column 1 of 3 x 3 cells
        later = np.concatenate([field[4:].ravel(), field[2:4, 4:].ravel()])
        assert field.max() == 1 and field[2:4, 2:4].max() > 0
        assert (later == 0).all() if direction == "causal" else (later > 0).any()
        # The default token is the last one of a causal model and the middle one of a bidirectional model.
        default = visualize.receptive_field(model, images)
        assert (default > 0).all() if direction == "causal" else (default == field).all()
    model = model_of(**KINDS["frames"])
    field = visualize.receptive_field(model, some_images(model), token=1)
    assert (field[2] == 0).all() and (field[:2].max(axis=(1, 2)) > 0).all()


@full("jax", "tensorflow")
def test_attention_maps_reproduce_the_outputs_of_the_layers():
    model = model_of(num_layers=3, mamba_ratio=1, attention_offset=0, num_kv_heads=1)
    maps = visualize.attention_maps(model, IMAGES, batch_size=2)
    assert list(maps) == ["block_0", "block_2"]
    features = numpy(model.extract_features(IMAGES))
    for name, before in (("block_0", "tokens"), ("block_2", "block_1")):
        block = model.backbone.blocks[int(name[-1])]
        inputs = block.mixer_norm(features[before])
        value = np.repeat(numpy(block.mixer.v_proj(inputs)).reshape(3, 9, 1, 4), 2, axis=2)
        mixed = np.einsum("bhts,bshc->bthc", maps[name], value).reshape(3, 9, 8)
        close(block.mixer.out_proj(mixed), numpy(block.mixer(inputs)), absolute=1e-5)
        close(maps[name].sum(-1), np.ones((3, 2, 9)))
        assert (maps[name][..., ~np.tri(9, dtype=bool)] == 0).all()


@full("jax")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_attention_weights_times_values_are_the_outputs_of_the_layer(causal, window):
    layer = AttentionLayer(16, num_heads=4, num_kv_heads=2, causal=causal, attention_window=window)
    inputs = RANDOM.standard_normal((2, 9, 16)).astype("float32")
    weights = numpy(layer.attention_weights(inputs))
    assert weights.shape == (2, 4, 9, 9) and weights.dtype == "float32"
    value = np.repeat(numpy(layer.v_proj(inputs)).reshape(2, 9, 2, 4), 2, axis=2)
    mixed = np.einsum("bhts,bshc->bthc", weights, value).reshape(2, 9, 16)
    close(layer.out_proj(mixed), numpy(layer(inputs)), absolute=1e-5)
    close(weights.sum(-1), np.ones((2, 4, 9)))
    distance = np.arange(9)[:, None] - np.arange(9)
    seen = ((distance >= 0) | (not causal)) & (np.abs(distance) < (window or 9))
    assert (weights[..., ~seen] == 0).all() and (weights[..., seen] > 0).all()


def test_the_token_order_is_the_scan_order_of_the_cells():
    snake = [[0, 0], [0, 1], [0, 2], [1, 2], [1, 1], [1, 0], [2, 0], [2, 1], [2, 2]]
    rows = [[i, j] for i in range(3) for j in range(3)]
    assert visualize.token_order(model_of(scan_order="snake"), IMAGES).tolist() == snake
    assert visualize.token_order(model_of(dtype="mixed_bfloat16"), IMAGES).tolist() == rows
    clips = RANDOM.random((1, 2, 6, 6, 1), "float32")
    model = model_of(**KINDS["grid+frames"] | {"scan_order": "snake"})
    assert visualize.token_order(model, clips).tolist() == [[t, *cell] for t in range(2) for cell in snake]
    model = model_of(**KINDS["frames"])
    assert visualize.token_order(model, some_images(model)).tolist() == [[0], [1], [2]]


@full("jax", "tensorflow")
@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_is_written_and_the_model_stays_unchanged(kind, tmp_path):
    from PIL import Image

    model = model_of(**KINDS[kind])
    images = some_images(model, 2 if kind == "grid" else 1)
    before = [numpy(v).copy() for v in model.variables]
    draw = {
        "saliency": lambda **to: visualize.draw_saliency(model, images, names="abc", **to),
        "receptive_field": lambda **to: visualize.draw_receptive_field(model, images, **to),
        "attention": lambda **to: visualize.draw_attention(model, images, token=0, **to),
        "token_order": lambda **to: visualize.draw_token_order(model, images, **to),
    }
    if kind == "grid":
        draw["occlusion"] = lambda **to: visualize.draw_occlusion(model, images, 3, classes=1, **to)
        draw["matrices"] = lambda **to: visualize.draw_attention_matrices(model, images, "block_1", **to)
    else:
        draw["frame_importance"] = lambda **to: visualize.draw_frame_importance(model, images, **to)
    for name, function in draw.items():
        figure = function(file=tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 10, name
        assert type(figure).__name__ == "Figure"
    assert len(before) == len(model.variables)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(numpy(variable), value, err_msg=variable.path)
    assert model.losses == []


@full("jax", "tensorflow")
@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("saliency", dict(images=IMAGES[0]), r"images must be one tensor of shape \(b, H, W, C\).*Received"),
        ("saliency", dict(images=IMAGES[:0]), "at least one image. Received"),
        ("saliency", dict(images=IMAGES.astype("uint8")), "floating-point.*Received.*uint8"),
        ("saliency", dict(classes=3), "classes must be None, an integer from 0 to 2.*Received: classes=3"),
        ("saliency", dict(classes=[0, 1]), "one for each of the 3 images. Received"),
        ("saliency", dict(classes=0.5), "classes must be None.*Received"),
        ("saliency", dict(samples=-1), "samples must be an integer of at least 0. Received"),
        ("saliency", dict(batch_size=0), "batch_size must be an integer of at least 1. Received"),
        ("draw_saliency", dict(names=["a"]), "a name for each of the 3 classes. Received"),
        ("occlusion", dict(size=7), "no larger than the image, 6 x 6 pixels. Received: size=7"),
        ("occlusion", dict(size=(2, 2, 2)), "size must be an integer or two. Received"),
        ("occlusion", dict(size=0), "size must be an integer of at least 1. Received"),
        ("occlusion", dict(size=2, stride=3), "stride must be at most size.*Received: stride=3"),
        ("occlusion", dict(size=2, fill=(1, 2)), "one for each of the 1 channels. Received"),
        ("occlusion", dict(size=2, score="loss"), "score must be one of.*Received"),
        ("frame_importance", dict(), "Only clips have frames. Received.*'grid'"),
        ("receptive_field", dict(token=9), "integer from -9 to 8.*Received: token=9"),
        ("receptive_field", dict(token=1.0), "Received: token=1.0"),
        ("draw_attention", dict(block="block_0"), r"block must be one of \['block_1'\]. Received"),
        ("draw_attention_matrices", dict(block=1), r"block must be one of \['block_1'\]. Received: block=1"),
        ("attention_maps", dict(model=model_of), "model must be a keras_jamba.DHCJamba. Received: function"),
    ],
)
def test_invalid_arguments_are_refused(plain, function, arguments, message):
    arguments = {"model": plain, "images": IMAGES} | arguments
    images = arguments.pop("images")
    with pytest.raises(ValueError, match=message):
        getattr(visualize, function)(arguments.pop("model"), images, **arguments)


def test_a_model_without_attention_has_no_maps():
    with pytest.raises(ValueError, match="block with attention. Received.*'mamba', 'mamba'.*mamba_ratio"):
        visualize.attention_maps(model_of(mamba_ratio=None), IMAGES)


def test_only_figures_require_matplotlib(plain, monkeypatch):
    for path in Path(visualize.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            assert "matplotlib" not in ast.unparse(node) or not isinstance(node, ast.Import | ast.ImportFrom)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib. Received.*pip install 'keras-jamba\[visualize\]'"):
        visualize.draw_token_order(plain, IMAGES)
    assert visualize.token_order(plain, IMAGES).shape == (9, 2)
