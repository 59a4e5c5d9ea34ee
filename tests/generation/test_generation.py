"""Generation against the model's own logits: batches, chunks, prompt states, samplers and stops."""

import checks
import golden_jamba
import keras
import numpy as np
import pytest
from checks import full, numpy

import keras_jamba
from keras_jamba import _backend
from keras_jamba.generation.prompt_state import PromptState
from keras_jamba.tokenizers import ByteTokenizer

PROMPTS = [[5, 6, 7, 8, 9], [11], [20, 21, 22]]


@pytest.fixture(scope="module")
def model():
    model = golden_jamba.keras_jamba.JambaCausalLM.from_preset(golden_jamba.FOLDER / "gqa_leftpad")
    keras.utils.set_random_seed(0)
    for variable in model.trainable_variables:
        if "embeddings" in variable.path:
            # The recorded tied head would repeat one token for ever.
            variable.assign(keras.random.normal(variable.shape, seed=3))
    return model


@pytest.fixture(scope="module")
def byte_model():
    """Returns an untrained model with a byte tokenizer."""
    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaCausalLM(
        259, d_model=16, num_layers=2, mamba_ratio=1, num_heads=2, moe_frequency=0, eos_token_id=258, pad_token_id=256
    )
    model.token_embedding.embeddings.assign(keras.random.normal((259, 16), seed=1))
    model.tokenizer = ByteTokenizer()
    return model


def greedy(forward, prompt, count):
    """Returns `prompt` and `count` greedy tokens, each from a full forward pass."""
    row = list(prompt)
    for _ in range(count):
        # Padded to one size, so that JAX compiles once.
        ids = np.array([row + [0] * (16 - len(row))])
        logits = forward({"token_ids": ids, "padding_mask": np.arange(16)[None] < len(row)})
        row.append(int(numpy(logits)[0, len(row) - 1].argmax()))
    return row


@full("jax", "tensorflow")
def test_each_prompt_of_a_batch_matches_full_forward_passes(model):
    rows, forward = model.generate(PROMPTS, max_new_tokens=6, stop_token_ids=None), checks.jitted(model)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert row.dtype == np.int32 and row.tolist() == greedy(forward, prompt, 6)


@full("tensorflow")
def test_a_row_ends_with_its_stop_token_and_the_others_continue(model):
    complete = model.generate(PROMPTS, max_new_tokens=6, stop_token_ids=None)
    stop = int(complete[0][len(PROMPTS[0]) + 2])
    rows = model.generate(PROMPTS, max_new_tokens=6, stop_token_ids=[stop])
    for prompt, reference, row in zip(PROMPTS, complete, rows, strict=True):
        new = reference[len(prompt) :].tolist()
        end = new.index(stop) + 1 if stop in new else 6
        assert row.tolist() == reference[: len(prompt) + end].tolist()
    assert len(rows[0]) <= len(PROMPTS[0]) + 3


def test_auto_stops_at_the_eos_tokens_of_the_model(model):
    complete, own = model.generate(PROMPTS[0], max_new_tokens=6, stop_token_ids=None), model._config["eos_token_id"]
    model._config["eos_token_id"] = [int(complete[-4]), 96]
    try:
        row = model.generate(PROMPTS[0], max_new_tokens=6)
    finally:
        model._config["eos_token_id"] = own
    assert row.tolist() == complete[: complete.tolist().index(complete[-4], len(PROMPTS[0])) + 1].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_arrays_stay_padded_on_the_same_side(model, side):
    ids, mask = np.full((3, 5), 96), np.zeros((3, 5), int)
    for i, prompt in enumerate(PROMPTS):
        here = slice(5 - len(prompt), 5) if side == "left" else slice(0, len(prompt))
        ids[i, here], mask[i, here] = prompt, 1
    found = model.generate({"token_ids": ids, "padding_mask": mask}, max_new_tokens=4, stop_token_ids=None)
    rows = model.generate(PROMPTS, max_new_tokens=4, stop_token_ids=None)
    assert found.shape == (3, 9)
    for prompt, row, padded in zip(PROMPTS, rows, found, strict=True):
        here = slice(5 - len(prompt), 9) if side == "left" else slice(0, len(prompt) + 4)
        np.testing.assert_array_equal(padded[here], row)


def test_input_types_and_length_arguments_agree(model):
    row = model.generate(PROMPTS[0], max_new_tokens=3, stop_token_ids=None)
    assert row.shape == (8,)
    array = model.generate(np.array([PROMPTS[0]]), max_length=8, stop_token_ids=None)
    np.testing.assert_array_equal(array, row[None])
    both = model.generate([PROMPTS[0]], max_length=20, max_new_tokens=3, stop_token_ids=None)
    np.testing.assert_array_equal(both[0], row)
    np.testing.assert_array_equal(
        model.generate(PROMPTS[0], max_new_tokens=3, strip_prompt=True, stop_token_ids=None), row[5:]
    )
    assert model.generate(PROMPTS[0], max_length=5, stop_token_ids=None).tolist() == PROMPTS[0]
    rows = model.generate(PROMPTS, max_length=6, stop_token_ids=None)
    assert [len(r) for r in rows] == [6, 6, 6]


def test_a_stream_yields_the_same_tokens_one_by_one(model):
    row = model.generate(PROMPTS[0], max_new_tokens=5, stop_token_ids=None)
    stream = model.stream(PROMPTS[0], max_new_tokens=5, stop_token_ids=None)
    assert next(stream) == row[5] and list(stream) == row[6:].tolist()


@full("jax", "tensorflow")
def test_a_prompt_state_resumes_exactly_and_checks_tokens_and_weights(model, tmp_path):
    begin = PROMPTS[0]
    model.prefill(begin, prefill_chunk_size=2).save(tmp_path / "state")
    state = PromptState.load(tmp_path / "state")
    prompts = [[*begin, 3, 4], begin]
    given = dict(max_new_tokens=70, stop_token_ids=None)  # more than the capacity of the saved state
    for plain, resumed in zip(
        model.generate(prompts, **given), model.generate(prompts, state=state, **given), strict=True
    ):
        np.testing.assert_array_equal(plain, resumed)
    with pytest.raises(ValueError, match="must begin with the 5 tokens of the state. Received: row 1"):
        model.generate([prompts[0], [5, 6, 7, 8, 1]], state=state)
    weight = model.backbone.blocks[0].mixer_norm.scale
    before = numpy(weight)
    try:
        weight.assign(before * (1 + 1e-6 * np.eye(len(before))[3]))
        with pytest.raises(ValueError, match="belongs to one model and its weights"):
            model.generate(begin, state=state)
    finally:
        weight.assign(before)
    data = (tmp_path / "state").read_bytes()
    for damaged in (b"nothing", data[: len(data) // 2], data[:100] + b"?" + data[101:]):
        (tmp_path / "state").write_bytes(damaged)
        with pytest.raises(ValueError, match="must be a file that its save wrote"):
            PromptState.load(tmp_path / "state")


def test_generate_uses_the_current_weights(byte_model):
    generate = lambda: byte_model.generate([[1, 2, 3]], max_new_tokens=6, stop_token_ids=None)[0].tolist()  # noqa: E731
    first, weight = generate(), byte_model.backbone.blocks[1].mixer_norm.scale
    before = numpy(weight)
    weight.assign(-3.0 * before)
    changed = generate()
    weight.assign(before)
    assert generate() == first != changed


def test_generating_a_token_runs_no_python_of_the_model(model, monkeypatch):
    calls, step = [], model.backbone.step
    monkeypatch.setattr(model.backbone, "step", lambda *given, **more: calls.append(1) or step(*given, **more))
    model.__dict__.pop("_decoders", None)
    model.generate(PROMPTS[0], max_new_tokens=20, stop_token_ids=None)
    # One call for the prompt and one to compile or record the step. TensorFlow traces a loop twice. PyTorch on a GPU
    # runs a few steps before it captures one.
    assert 2 <= len(calls) <= (8 if _backend.tensors.platform() == "gpu" else 4)


def test_a_model_whose_router_reads_values_still_generates():
    @keras.saving.register_keras_serializable(package="tests")
    class ReadsValues(keras_jamba.layers.Router):
        def choose(self, logits, mask, training):
            if keras.backend.backend() == "torch" and numpy(logits)[0, 0] > 0:
                logits = -logits  # selects other experts
            return super().choose(logits, mask, training)

    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaCausalLM(
        31, d_model=16, num_layers=2, mamba_ratio=1, num_heads=2, d_ff=16, router=ReadsValues(3, 1)
    )
    model.token_embedding.embeddings.assign(keras.random.normal((31, 16), seed=1))
    row = model.generate([1, 2, 3], max_new_tokens=8, stop_token_ids=None)
    # One token per call, because this router decides by the first token of each call.
    step, cache, found = checks.jitted(model.step), model.init_cache(1, 16), [1, 2, 3]
    logits, cache = step({"token_ids": np.array([[1, 2, 3]])}, cache)
    for _ in range(8):
        found.append(int(numpy(logits)[0, -1].argmax()))
        logits, cache = step({"token_ids": np.array([found[-1:]])}, cache)
    assert row.tolist() == found


def test_equal_seeds_give_equal_samples_and_other_seeds_differ(model):
    def drawn(seed):
        sampler = keras_jamba.Sampler(temperature=2.0, top_k=20, seed=seed)
        return model.generate(PROMPTS, max_new_tokens=8, stop_token_ids=None, sampler=sampler, strip_prompt=True)

    np.testing.assert_array_equal(drawn(1), drawn(1))
    assert not np.array_equal(drawn(1), drawn(2))


def test_a_repetition_penalty_applies_to_prompt_and_new_tokens(model):
    sampler = keras_jamba.Sampler(temperature=0.0, repetition_penalty=1e6)
    row = model.generate(PROMPTS[0], max_new_tokens=8, stop_token_ids=None, sampler=sampler)
    assert len(set(row.tolist())) == len(row)


def test_compile_accepts_keras_hub_samplers(model):
    class Second:
        temperature = 1.0

        def get_next_token(self, probabilities):
            return keras.ops.top_k(probabilities, 2)[1][:, 1]

    row = model.generate(PROMPTS[0], max_new_tokens=4, stop_token_ids=None, sampler=Second(), strip_prompt=True)
    complete = numpy(checks.jitted(model)(np.array([[*PROMPTS[0], *row]])))[0, 4:-1]
    np.testing.assert_array_equal(row, np.argsort(complete, axis=-1)[:, -2])
    model.compile(sampler=Second())
    again = model.generate(PROMPTS[0], max_new_tokens=4, stop_token_ids=None, strip_prompt=True)
    model.compile()
    np.testing.assert_array_equal(again, row)


def test_text_prompts_return_text(byte_model):
    text = byte_model.generate("abc", max_new_tokens=8, stop_token_ids=None)
    assert isinstance(text, str) and text.startswith("abc")
    batch = byte_model.generate(["abc", "z"], max_new_tokens=8, stop_token_ids=None)
    assert batch == [text, byte_model.generate("z", max_new_tokens=8, stop_token_ids=None)]
    assert byte_model.generate("abc", max_new_tokens=8, stop_token_ids=None, strip_prompt=True) == text[3:]
    assert "".join(byte_model.stream("abc", max_new_tokens=8, stop_token_ids=None)) == text[3:]


def test_text_ends_before_a_stop_string(byte_model):
    new = byte_model.generate("abc", max_new_tokens=40, stop_token_ids=None, strip_prompt=True)
    for stop in (new[3:5], new[20:23], new[:1]):
        expected = new[: new.index(stop)]
        given = dict(max_new_tokens=40, stop_token_ids=None, stop_strings=[stop, "never"])
        assert byte_model.generate("abc", strip_prompt=True, **given) == expected
        assert "".join(byte_model.stream("abc", **given)) == expected


@full("jax", "tensorflow")
def test_requests_share_compiled_programs(model):
    """Samplers that differ only in their seed share one. A subclass has its own. Several prompt lengths share one."""

    class Last(keras_jamba.Sampler):
        def choose(self, logits, uniform, seen=None):
            return keras.ops.full_like(keras.ops.argmax(logits, axis=-1), 96, dtype="int32")

    given = dict(max_new_tokens=6, stop_token_ids=None)
    model.generate(PROMPTS, sampler=keras_jamba.Sampler(seed=1), **given)
    made = set(model._decoders)
    model.generate([[1, 2, 3], [4], [5]], sampler=keras_jamba.Sampler(seed=np.int64(2), top_k=None), **given)
    assert set(model._decoders) == made
    assert model.generate([[1]], sampler=Last(seed=1), **given)[0].tolist() == [1] + [96] * 6
    assert len(set(model._decoders) - made) == 1
    assert len({id(decoder.compiled_step) for decoder in model._decoders.values()}) == 1
    shapes = []
    decoder = next(iter(model._decoders.values()))
    prefill, decoder.compiled_step = (
        decoder.compiled_step,
        lambda inputs, cache: shapes.append(inputs["token_ids"].shape) or (prefill(inputs, cache)),
    )
    for length in (1, 7, 16):
        decoder.prefill(np.ones((1, length), "int32"), np.ones((1, length), bool), model.init_cache(1, 64), 512)
    decoder.compiled_step = prefill
    assert keras.backend.backend() == "torch" or set(shapes) == {(1, 16)}


def test_samplers_with_different_long_arrays_have_their_own_programs(model):
    class Biased(keras_jamba.Sampler):
        def __init__(self, bias, **more):
            super().__init__(**more)
            self.bias = bias

        def get_config(self):
            return super().get_config() | {"bias": self.bias}

        def choose(self, logits, uniform, seen=None):
            bias = keras.ops.convert_to_tensor(self.bias[: logits.shape[-1]])
            return keras.ops.cast(keras.ops.argmax(bias + 0 * logits, axis=-1), "int32")

    # The `repr` of an array of more than 1,000 numbers shows six of them.
    for token in (50, 60):
        bias = np.zeros(2000, "float32")
        bias[token] = 1
        found = model.generate([[1]], sampler=Biased(bias, seed=1), max_new_tokens=2, stop_token_ids=None)
        assert found[0].tolist() == [1, token, token]


@pytest.mark.parametrize(
    "inputs, given, message",
    [
        ([], {}, "Every prompt must have a token. Received: no prompts"),
        ([[]], {}, "Received: none in row 0"),
        ([[1], []], {}, "Received: none in row 1"),
        ([[1, 97]], {}, "from 0 to vocab_size - 1 = 96. Received: 97 in row 0"),
        ([[1, -1]], {}, "Received: -1 in row 0"),
        ([[1], [3, 2**32 + 3]], {}, "from 0 to vocab_size - 1 = 96. Received: 2147483647 in row 1"),
        ([[1.5]], {}, "must be integers. Received: .*dtype=float64"),
        ("text", {}, "Text needs a tokenizer"),
        (
            [[1, 2, 3]],
            dict(max_length=2),
            "at most max_length tokens long. Received: 3 tokens in row 0 and max_length=2",
        ),
        ([[1]], dict(max_new_tokens=-1), "max_new_tokens must be an integer of at least 0"),
        ([[1]], dict(sampler="beam"), "sampler must be one of .*get_next_token"),
        ([[1]], dict(stop_token_ids="eos"), "stop_token_ids must be one of"),
        ([[1]], dict(stop_strings=["x"]), "Stop strings need a tokenizer"),
        ({"token_ids": [[1, 2]], "padding_mask": [[1]]}, {}, "must have one shape"),
        ({"token_ids": [[1, 2, 3]], "padding_mask": [[1, 0, 1]]}, {}, "Padding must be on one side"),
        ({"ids": [[1]]}, {}, "must hold token_ids"),
    ],
)
def test_bad_prompts_are_refused(inputs, given, message):
    plain = golden_jamba.model("dense")
    with pytest.raises(ValueError, match=message):
        plain.generate(inputs, **given)


def test_a_call_refuses_ids_out_of_the_vocabulary():
    with pytest.raises(ValueError, match="from 0 to vocab_size - 1 = 96. Received: 97"):
        golden_jamba.model("dense")(np.array([[1, 97]]))
