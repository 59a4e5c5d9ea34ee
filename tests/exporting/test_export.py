"""Exported files give the model's numbers in their own runtimes; everything else is refused and leaves no file."""

import shutil
from collections import OrderedDict

import keras
import numpy as np
import pytest
from checks import close, full, numpy, once

import keras_jamba
from keras_jamba import exporting
from keras_jamba.exporting import runtimes
from keras_jamba.exporting.formats import FORMATS
from keras_jamba.layers import AttentionLayer, MambaLayer, MoELayer

BACKEND = keras.backend.backend()
HERE = [name for name, found in FORMATS.items() if BACKEND in found.backends]
# The format of most tests, fast to write and to run.
FORMAT = {"jax": "jax_export", "tensorflow": "litert", "torch": "onnx"}[BACKEND]
FEATURES = keras.InputSpec(shape=(None, None, 16), dtype="float32")
SIZES = [(1, 1), (2, 7), (1, 64), (3, 257)]


def place(folder, format):
    return folder / f"model{FORMATS[format].suffix or ''}"


def language_model(**given):
    options = dict(d_model=32, num_layers=4, mamba_ratio=1, num_heads=4, num_kv_heads=2, moe_frequency=2, num_experts=4)
    return keras_jamba.JambaCausalLM(64, **options | given)


def classifier():
    return keras_jamba.JambaClassifier(64, 3, d_model=32, num_layers=4, mamba_ratio=1, num_heads=4, moe_frequency=2)


MODELS = {
    "digits": lambda: keras_jamba.DHCJamba.from_preset("digits"),
    "small": lambda: keras_jamba.DHCJamba.from_preset("small"),
    "video_order": lambda: keras_jamba.DHCJamba.from_preset("video_order"),
    "text classifier": classifier,
    "language model": language_model,
}
# Each model in one format per backend, and each format with one model; benchmarks/exporting has the complete table.
NAMES = ("digits", "language model") if BACKEND == "jax" else MODELS
CASES = [(name, FORMAT) for name in NAMES] + [("language model", name) for name in HERE if name != FORMAT]


@pytest.mark.parametrize("format", HERE)
def test_a_file_computes_every_batch_and_length_in_its_own_runtime(format, tmp_path):
    layer = MambaLayer(16, d_state=4)
    file = place(tmp_path, format)
    assert keras_jamba.export(layer, file, format, input_signature=FEATURES) < 1e-5
    run = runtimes.load(format, file)
    for sizes in SIZES:
        x = np.random.default_rng(0).standard_normal((*sizes, 16)).astype("float32")
        close(run({"input": x})["output"], numpy(layer(x)), relative=1e-5, absolute=1e-5)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".bin"] == [file.name]


@full()
@pytest.mark.parametrize(("name", "format"), CASES)
def test_models_and_formats_agree(name, format, tmp_path):
    assert keras_jamba.export(MODELS[name](), place(tmp_path, format), format) < 1e-4


@full()
@pytest.mark.parametrize("name", ["video_direction", "language model"])
def test_an_exported_stream_gives_the_outputs_of_the_complete_sequence(name, tmp_path):
    rng, file = np.random.default_rng(0), place(tmp_path, FORMAT)
    if name == "language model":
        model, key, length = language_model(), "token_ids", 12
        clip_or_text = rng.integers(0, 64, (2, length)).astype("int32")
        expected = numpy(model(clip_or_text))
        parts = [clip_or_text[:, :5], *(clip_or_text[:, i : i + 1] for i in range(5, length))]
        expected = [expected[:, i] for i in range(4, length)]
    else:
        model, key = keras_jamba.DHCJamba.from_preset("video_direction"), "frame"
        clip_or_text = rng.uniform(0, 1, (2, 6, *model.input_shape[2:])).astype("float32")
        expected, parts = [numpy(model(clip_or_text))], [clip_or_text[:, i] for i in range(clip_or_text.shape[1])]
    keras_jamba.export(model, file, FORMAT, streaming=True, capacity=24)
    run = runtimes.load(FORMAT, file)
    program = exporting.programs.stream_program(model, None, None, 24)
    state, found = program.example({"batch": 2, "length": 1}), []
    state = {k: state[k] for k in program.state}
    for i, part in enumerate(parts):
        outputs = run({key: part, "reset": np.full(2, i == 0), **state})
        found.append(outputs["logits"].reshape(2, -1))
        state = {k: outputs[f"next_{k}"] for k in state}
    for one, other in zip(found[-len(expected) :], expected, strict=True):
        close(one, other, relative=1e-4, absolute=1e-4)


@full()
def test_a_trained_classifier_keeps_its_accuracy_in_the_runtime(tmp_path):
    keras.utils.set_random_seed(3)
    rng = np.random.default_rng(0)
    # The class is the sign of the first token, far before the last one.
    x = rng.standard_normal((256, 24, 4)).astype("float32")
    y = (x[:, 0, 0] > 0).astype("int32")
    inputs = keras.Input((None, 4))
    features = MambaLayer(16, d_state=4)(keras.layers.Dense(16)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2)(features[:, -1]))
    model.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=30, batch_size=64, verbose=0)
    expected = numpy(model(x)).argmax(1)
    assert (expected == y).mean() > 0.9
    keras_jamba.export(model, place(tmp_path, FORMAT), FORMAT)
    (name,) = exporting.programs.call_program(model, None, None, None).inputs
    run = runtimes.load(FORMAT, place(tmp_path, FORMAT))
    np.testing.assert_array_equal(run({name: x})["output"].argmax(1), expected)


def test_fixed_sizes_and_several_inputs_and_outputs_keep_their_names(tmp_path):
    right, left = keras.Input((None, 16), name="right"), keras.Input((None, 16), name="left")
    mixed = AttentionLayer(16, num_heads=2)(left - right)
    model = keras.Model(OrderedDict(right=right, left=left), {"mixed": mixed, "difference": left - right})
    file = place(tmp_path, FORMAT)
    keras_jamba.export(model, file, FORMAT, batch_size=2, length=6)
    rng = np.random.default_rng(0)
    x = {name: rng.standard_normal((2, 6, 16)).astype("float32") for name in ("right", "left")}
    found = runtimes.load(FORMAT, file)(x)
    # Keras takes the values of a plain dict in the order of the names here.
    expected = numpy(model(OrderedDict(x)))
    assert sorted(found) == ["difference", "mixed"]
    for name in found:
        close(found[name], expected[name], relative=1e-5, absolute=1e-5)


def test_a_file_of_other_weights_or_damaged_bytes_is_found(tmp_path):
    layer, file = MambaLayer(16, d_state=4), place(tmp_path, FORMAT)
    keras_jamba.export(layer, file, FORMAT, input_signature=FEATURES)
    assert exporting.check_export(layer, file, FORMAT, input_signature=FEATURES) < 1e-5
    other = MambaLayer(16, d_state=4)
    with pytest.raises(ValueError, match="The relative difference of the output 'output' at the sizes"):
        exporting.check_export(other, file, FORMAT, input_signature=FEATURES)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="must be able to read and run the file"):
        exporting.check_export(layer, file, FORMAT, input_signature=FEATURES)
    with pytest.raises(FileNotFoundError, match="There must be an exported file at the path"):
        exporting.check_export(layer, file.with_name("other" + file.suffix), FORMAT, input_signature=FEATURES)


def test_a_file_whose_numbers_differ_never_appears(tmp_path, monkeypatch):
    layer, file = MambaLayer(16, d_state=4), place(tmp_path, FORMAT)
    file.write_bytes(b"older file")
    load = runtimes.load
    wrong = lambda run: lambda arrays: {k: x * np.float32(1.001) for k, x in run(arrays).items()}  # noqa: E731
    monkeypatch.setattr(runtimes, "load", lambda *given: wrong(load(*given)))
    with pytest.raises(ValueError, match=r"must be at most 0.0001. Received: 0.001"):
        keras_jamba.export(layer, file, FORMAT, input_signature=FEATURES)
    assert file.read_bytes() == b"older file"
    assert list(tmp_path.iterdir()) == [file]


def test_an_export_changes_no_weights_or_statistics(tmp_path):
    layer = MoELayer(16, num_experts=4, d_ff=8)
    layer(np.ones((1, 3, 16), "float32"))
    before = [numpy(v) for v in layer.variables]
    keras_jamba.export(layer, place(tmp_path, FORMAT), FORMAT, input_signature=FEATURES)
    for was, variable in zip(before, layer.variables, strict=True):
        np.testing.assert_array_equal(was, numpy(variable))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(format="tflite"), "format must be one of"),
        (dict(format="onnx" if BACKEND != "torch" else "litert"), "is written on .* Save the model, and load and"),
        (dict(precision="float16"), "precision of the format .* must be one of"),
        (dict(batch_size=0), "batch_size must be an integer of at least 1"),
        (dict(capacity=4), "capacity is for streams"),
        (dict(streaming=True), "A stream defines its own inputs"),
        (dict(streaming=True, input_signature=None), "streaming=True is for DHCJamba models of clips and"),
        (dict(input_signature=None), "input_signature is required for a layer"),
        (dict(input_signature=keras.InputSpec(dtype="float32")), "needs a shape with a batch axis"),
        (dict(model=3), "model must be a keras.Layer"),
        (dict(model=keras.layers.Dense(4, dtype="mixed_float16")), "Exports compute in float32"),
        (dict(length=5, input_signature=keras.InputSpec(shape=(None, 4, 16))), "length fixes an open axis 1 of an"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(given, message, tmp_path):
    arguments = dict(model=MambaLayer(16, d_state=4), format=FORMAT, input_signature=FEATURES) | given
    with pytest.raises(ValueError, match=message):
        keras_jamba.export(path=place(tmp_path, FORMAT), **arguments)
    assert not list(tmp_path.iterdir())


def test_a_stream_without_capacity_and_a_wrong_suffix_are_refused(tmp_path):
    with pytest.raises(ValueError, match="streaming=True needs capacity"):
        keras_jamba.export(language_model(), place(tmp_path, FORMAT), FORMAT, streaming=True)
    if FORMATS[FORMAT].suffix:
        with pytest.raises(ValueError, match="The path of the format .* must end with"):
            keras_jamba.export(language_model(), tmp_path / "model.bin", FORMAT)
    assert not list(tmp_path.iterdir())


@once
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("keras_jamba.exporting.formats.missing", lambda modules: ["onnxruntime"])
    with pytest.raises(ImportError, match=r"no onnxruntime. Install them with: pip install 'keras-jamba\[onnx\]'"):
        keras_jamba.export(MambaLayer(16), tmp_path / "model.onnx", "onnx", input_signature=FEATURES)


@once
def test_quantized_weights_stay_integers_and_the_tokenizer_lies_beside(tmp_path):
    model = language_model(d_model=64, num_layers=2)
    model.tokenizer = keras_jamba.tokenizers.ByteTokenizer()
    keras_jamba.export(model, tmp_path / "float.onnx", "onnx", check=False)
    model.quantize("int8")
    keras_jamba.export(model, tmp_path / "int8.onnx", "onnx")
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("float", "int8")]
    assert sizes[1] < 0.6 * sizes[0]
    tokenizer = keras_jamba.tokenizers.load_tokenizer(tmp_path / "int8_tokenizer")
    assert isinstance(tokenizer, keras_jamba.tokenizers.ByteTokenizer)


@full("torch")
@once
def test_half_precision_is_checked_with_its_own_tolerance(tmp_path):
    difference = keras_jamba.export(classifier(), tmp_path / "model.xml", "openvino", precision="float16")
    assert 1e-6 < difference < 5e-2


def test_a_saved_model_replaces_only_a_saved_model(tmp_path):
    if "tf_saved_model" not in HERE:
        pytest.skip("a format of JAX and TensorFlow, where it runs")
    layer, folder = MambaLayer(16, d_state=4), tmp_path / "saved"
    keras_jamba.export(layer, folder, "tf_saved_model", input_signature=FEATURES)
    keras_jamba.export(layer, folder, "tf_saved_model", input_signature=FEATURES, check=False)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "mine").write_text("text")
    with pytest.raises(OSError):
        keras_jamba.export(layer, folder, "tf_saved_model", input_signature=FEATURES, check=False)
    assert (folder / "mine").read_text() == "text"


class Halves(keras.layers.Layer):
    """Doubles few tokens and triples many, which one graph cannot express."""

    def call(self, inputs):
        count = inputs.shape[0] * inputs.shape[1]
        return inputs * 2 if count <= 1000 else inputs * 3


class Doubled(keras.layers.Layer):
    """Returns two outputs whose names are equal as identifiers."""

    def call(self, inputs):
        return {"a.b": inputs, "a_b": 2 * inputs}


class Ignoring(keras.layers.Layer):
    """Multiplies by a mask, or ignores it."""

    def __init__(self, ignores, **kwargs):
        super().__init__(**kwargs)
        self.ignores = ignores

    def call(self, inputs):
        return inputs["x"] if self.ignores else inputs["x"] * keras.ops.cast(inputs["mask"], "float32")


@once
def test_a_graph_that_holds_at_some_sizes_only_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the graph is valid only where"):
        keras_jamba.export(Halves(), tmp_path / "model.onnx", "onnx", input_signature=FEATURES)
    assert not list(tmp_path.iterdir())


def test_outputs_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="The names of the outputs must differ"):
        keras_jamba.export(Doubled(), place(tmp_path, FORMAT), FORMAT, input_signature=FEATURES)
    assert not list(tmp_path.iterdir())


def test_the_check_sees_masks(tmp_path):
    signature = {"x": FEATURES, "mask": keras.InputSpec(shape=(None, None, 1), dtype="bool")}
    keras_jamba.export(Ignoring(False), place(tmp_path, FORMAT), FORMAT, input_signature=signature)
    with pytest.raises(ValueError, match="The relative difference of the output 'output'"):
        exporting.check_export(Ignoring(True), place(tmp_path, FORMAT), FORMAT, input_signature=signature)


@once
def test_a_folder_beside_that_holds_no_tokenizer_is_kept(tmp_path):
    model = language_model(num_layers=2)
    model.tokenizer = keras_jamba.tokenizers.ByteTokenizer()
    (tmp_path / "model_tokenizer").mkdir()
    (tmp_path / "model_tokenizer" / "mine").write_text("text")
    with pytest.raises(FileExistsError, match="must be new or hold a tokenizer"):
        keras_jamba.export(model, tmp_path / "model.pt2", "torch")
    assert [path.name for path in tmp_path.rglob("*")] == ["model_tokenizer", "mine"]
