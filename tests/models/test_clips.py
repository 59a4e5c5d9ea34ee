"""DHCJamba on clips and on streams of frames, and its options on images."""

import keras
import numpy as np
import pytest
from checks import close, full, jitted, numpy

import keras_jamba

TINY = dict(num_classes=3, d_model=8, num_layers=2, mamba_ratio=1, num_heads=2, num_experts=4, downsample=2)
CLIPS = np.random.default_rng(0).random((2, 5, 6, 6, 1), "float32")


def model_of(**options):
    keras.utils.set_random_seed(0)
    return keras_jamba.DHCJamba(**{"image_shape": (None, 6, 6, 1)} | TINY | options)


STREAMS = {
    "frames": dict(tokens="frames"),
    "frames last": dict(tokens="frames", readout="last", mixer="gated_conv"),
    "grid+frames": dict(tokens="grid+frames", scan_order="snake", stem="patchify"),
    "grid+frames seqpool": dict(tokens="grid+frames", readout="seqpool", mamba_ratio=None),
}


@pytest.mark.parametrize("options", STREAMS.values(), ids=STREAMS)
def test_a_stream_has_the_logits_of_the_clip_after_every_frame(options):
    model = model_of(**options)
    step, call = jitted(model.step), jitted(model)
    cache = model.init_cache(2, max_frames=3)
    for t in range(3):
        logits, cache = step(CLIPS[:, t], cache)
        close(logits, numpy(call(CLIPS[:, : t + 1])), absolute=1e-5)


@full("jax")
@pytest.mark.parametrize("options", list(STREAMS.values())[:3], ids=list(STREAMS)[:3])
def test_a_reset_starts_another_stream_in_its_row(options):
    model = model_of(**options)
    step, call, cache = jitted(model.step), jitted(model), model.init_cache(2, max_frames=2)
    for t in range(3):
        logits, cache = step(CLIPS[:, t], cache, np.array([t == 1, t in (0, 2)]))
    close(numpy(logits)[0], numpy(call(CLIPS[:1, 1:3]))[0], absolute=1e-5)
    close(numpy(logits)[1], numpy(call(CLIPS[1:, 2:3]))[0], absolute=1e-5)
    with pytest.raises(ValueError, match=r"reset_mask must have the shape \(b\).*Received"):
        model.step(CLIPS[:, 0], cache, np.array([True]))


def test_a_windowed_stream_runs_in_constant_memory():
    model = model_of(tokens="frames", attention_window=4)
    step, cache = jitted(model.step), model.init_cache(1)
    shapes = keras.tree.map_structure(lambda x: tuple(x.shape), cache)
    frames = np.random.default_rng(1).random((1, 40, 6, 6, 1), "float32")
    for t in range(40):
        logits, cache = step(frames[:, t], cache)
        assert keras.tree.map_structure(lambda x: tuple(x.shape), cache) == shapes
        # On PyTorch a graph for gradients would keep all earlier frames.
        assert not any(getattr(x, "requires_grad", False) for x in keras.tree.flatten(cache))
    close(logits, numpy(jitted(model)(frames)), absolute=1e-4)


@full("jax", "tensorflow")
def test_a_model_learns_from_clips_and_the_order_of_frames_matters(tmp_path):
    model = model_of(tokens="frames", image_shape=(5, 6, 6, 1))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(CLIPS, np.array([0, 2]), epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert np.abs(numpy(model(CLIPS)) - numpy(model(CLIPS[:, ::-1].copy()))).max() > 1e-4
    model.save(tmp_path / "clips.keras")
    loaded = keras.models.load_model(tmp_path / "clips.keras")
    np.testing.assert_array_equal(numpy(loaded(CLIPS)), numpy(model(CLIPS)))


def test_only_a_bidirectional_image_model_sees_later_tokens():
    image = np.random.default_rng(2).random((1, 6, 6, 1), "float32")
    changed = image.copy()
    changed[0, 5, 5] = 1 - changed[0, 5, 5].round()
    for direction, changes in (("causal", False), ("bidirectional", True)):
        model = model_of(image_shape=(6, 6, 1), stem="patchify", direction=direction, moe_frequency=0)
        features = jitted(model.extract_features)
        first = [numpy(features(x)["block_1"])[0, 0] for x in (image, changed)]
        assert (np.abs(first[0] - first[1]).max() > 1e-6) == changes


def test_a_model_of_any_image_size_takes_clips_of_any_size():
    model = model_of(image_shape=(None, None, None, 1), tokens="grid+frames", scan_order="snake", attention_window=9)
    step, call = jitted(model.step), jitted(model)
    for size in (6, 8):
        clips = np.random.default_rng(3).random((1, 2, size, size, 1), "float32")
        logits, cache = step(clips[:, 0], model.init_cache(1))
        logits, _ = step(clips[:, 1], cache)
        close(logits, numpy(call(clips)), absolute=1e-5)


def test_the_config_and_the_block_pattern_hold_the_options():
    model = model_of(image_shape=(6, 6, 1), mixer="gated_conv", readout="seqpool", stem="patchify", scan_order="snake")
    assert model.block_pattern == (("gated_conv", "dense"), ("attention", "moe"))
    again = keras_jamba.DHCJamba.from_config(model.get_config())
    again.set_weights(model.get_weights())
    np.testing.assert_array_equal(numpy(again(CLIPS[:, 0])), numpy(model(CLIPS[:, 0])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_shape": (6, 6, 1), "tokens": "frames"},
            r"image_shape must be \(T, H, W, C\).*Received.*tokens='grid'",
        ),
        ({"tokens": "grid"}, r"image_shape must be \(H, W, C\).*Received.*tokens='frames' or"),
        ({"tokens": "pixels"}, "tokens must be one of.*Received"),
        ({"stem": "vgg"}, "stem must be one of.*Received"),
        ({"scan_order": "snake"}, r"scan_order must be one of \['row'\]. Received"),
        ({"image_shape": (True, 6, 6, 1)}, "positive integers.*Received"),
        ({"readout": "cls"}, "readout must be one of.*Received"),
        ({"direction": "cross"}, "direction must be one of.*Received"),
        ({"mixer": "lstm"}, "mixer must be one of.*Received"),
    ],
)
def test_bad_options_are_reported(options, message):
    with pytest.raises(ValueError, match=message):
        model_of(**{"tokens": "frames"} | options)


@full("jax")
def test_invalid_streams_are_refused():
    with pytest.raises(ValueError, match="causal model of clips.*Received: tokens='grid'"):
        model_of(image_shape=(6, 6, 1)).init_cache(1)
    with pytest.raises(ValueError, match="causal model of clips.*Received.*bidirectional"):
        model_of(tokens="frames", direction="bidirectional").init_cache(1)
    model = model_of(tokens="frames")
    with pytest.raises(ValueError, match="max_frames must be an integer.*Received: max_frames=None"):
        model.init_cache(1)
    with pytest.raises(ValueError, match="size is known. Received: image_shape=.*attention_window"):
        model_of(image_shape=(None, None, None, 1), tokens="grid+frames").init_cache(1, max_frames=2)
    cache = model.init_cache(1, max_frames=2)
    with pytest.raises(ValueError, match=r"\(b, H, W, C\).*Received: shape=\(1, 5, 6, 6, 1\)"):
        model.step(CLIPS[:1], cache)
    with pytest.raises(ValueError, match="backbone and readout. Received"):
        model.step(CLIPS[:1, 0], cache["backbone"])
    with pytest.raises(ValueError, match="must be a dict with backbone and readout. Received: NoneType"):
        model.step(CLIPS[:1, 0], None)
    with pytest.raises(ValueError, match=r"cache\['mean'\] must have the shape \(1, 8\).*Received: shape=\(2, 8\)"):
        model.step(CLIPS[:1, 0], cache | {"readout": model.init_cache(2, max_frames=2)["readout"]})
    for t in range(2):
        _, cache = model.step(CLIPS[:1, t], cache)
    with pytest.raises(ValueError, match="Received: a capacity of 2 tokens, 3 needed"):
        model.step(CLIPS[:1, 2], cache)
