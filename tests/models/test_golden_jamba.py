"""Jamba against transformers on its checkpoints: logits, losses, every gradient, states, and greedy tokens."""

import golden_jamba
import keras
import numpy as np
import pytest
from checks import full, jitted, numpy, variable_gradients
from golden_jamba import call, features, model, recorded, step
from keras import ops

CASES = ["dense", "moe", "gqa_leftpad", "proj_bias"]
LANGUAGE = [*CASES, "mamba1_lm"]


def close(actual, expected, case):
    np.testing.assert_allclose(
        ops.convert_to_numpy(actual), expected, rtol=0, atol=1e-4 * max(1, recorded(case)["logits"].std())
    )


def stateless(case, inputs):
    """Returns `(logits, non-trainable variables by path, losses)`."""
    others = model(case).non_trainable_variables
    values = [[v.value for v in variables] for variables in (model(case).trainable_variables, others)]
    logits, changed, losses = model(case).stateless_call(*values, inputs, return_losses=True)
    return logits, dict(zip([v.path for v in others], changed, strict=True)), losses


def loss(case):
    """Returns the sum of next-token cross-entropy and auxiliary loss, as in `fit`."""
    labels = recorded(case)["labels"][:, 1:]
    counted = (labels != -100).astype("float32")
    targets = np.where(labels == -100, 0, labels).astype("int32")
    logits, _, losses = stateless(case, recorded(case)["input_ids"])
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    return entropy(targets, logits[:, :-1], counted) + sum(losses)


@pytest.fixture(autouse=True)
def built(request):
    """Builds the model of a test outside the traced code."""
    if "case" in request.fixturenames:
        model(request.getfixturevalue("case"))


@pytest.mark.parametrize("case", LANGUAGE)
def test_hidden_states_and_logits_equal_transformers(case):
    blocks = [features(case)[f"block_{i}"] for i in range(len(model(case).block_pattern))]
    np.testing.assert_allclose(np.stack(blocks), recorded(case)["hidden_after_layer"], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(features(case)["features"], recorded(case)["final_norm"], rtol=1e-4, atol=2e-5)
    close(numpy(call(case)(recorded(case)["input_ids"])), recorded(case)["logits"], case)


@pytest.mark.parametrize("case", ["moe", "gqa_leftpad"])
def test_router_logits_equal_transformers(case):
    routing = features(case)["routing"]
    logits = [layer["logits"].reshape(-1, layer["logits"].shape[-1]) for layer in routing.values()]
    np.testing.assert_allclose(np.stack(logits), recorded(case)["router_logits"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", LANGUAGE)
def test_losses_equal_transformers(case):
    np.testing.assert_allclose(numpy(jitted(lambda: loss(case))()), recorded(case)["loss"], rtol=1e-5)


@full("jax")
@pytest.mark.parametrize("case", ["moe", "gqa_leftpad"])
@pytest.mark.parametrize("prefix", ["", "lp_", "rp_"])
def test_the_auxiliary_loss_over_all_layers_equals_transformers(case, prefix):
    arrays = recorded(case)
    mask = arrays[f"{prefix}attention_mask"] if prefix else None
    inputs = {"token_ids": arrays[f"{prefix}input_ids"], "padding_mask": mask}
    _, changed, (aux,) = numpy(jitted(lambda inputs: stateless(case, inputs))(inputs))
    coefficient = model(case).get_config()["balance_coefficient"]
    np.testing.assert_allclose(aux / coefficient, arrays[f"{prefix}aux_loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(changed[model(case).backbone.aux_loss.path], aux)


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_equals_transformers(case):
    expected = golden_jamba.gradients(case)
    variables = model(case).trainable_variables
    paths = [v.path.removeprefix(f"{model(case).name}/") for v in variables]
    assert sorted(paths) == sorted(expected)
    for path, gradient in zip(paths, variable_gradients(lambda: loss(case), variables), strict=True):
        np.testing.assert_allclose(gradient, expected[path], rtol=1e-4, atol=1e-6, err_msg=path)


@full("jax")
@pytest.mark.parametrize("case", CASES)
def test_packed_documents_have_the_true_logits(case):
    inputs = {"token_ids": recorded(case)["input_ids"], "segment_ids": recorded(case)["truth_segment_ids"]}
    close(numpy(call(case)(inputs)), recorded(case)["truth_packed_logits"], case)


@full("jax")
@pytest.mark.parametrize("case", CASES)
def test_left_padded_rows_have_the_true_logits_and_those_of_single_rows(case):
    mask = recorded(case)["lp_attention_mask"].astype(bool)
    logits = numpy(call(case)({"token_ids": recorded(case)["lp_input_ids"], "padding_mask": mask}))[mask]
    close(logits, recorded(case)["truth_lp_logits"][mask], case)
    close(logits, recorded(case)["lp_solo_logits"][mask], case)


@pytest.mark.parametrize("case", CASES)
def test_right_padded_rows_have_the_logits_of_transformers(case):
    mask = recorded(case)["rp_attention_mask"].astype(bool)
    logits = numpy(call(case)({"token_ids": recorded(case)["rp_input_ids"], "padding_mask": mask}))[mask]
    close(logits, recorded(case)["rp_logits"][mask], case)


@full("jax")
@pytest.mark.parametrize("case", CASES)
def test_chunked_prefill_has_the_true_logits_and_states(case):
    ids, ends = recorded(case)["input_ids"], recorded(case)["truth_chunk_ends"]
    cache, logits, start = model(case).init_cache(len(ids), max_length=16), [], 0
    for end in ends:
        y, cache = step(case)(ids[:, start:end], cache)
        logits.append(y)
        start = end
    close(numpy(ops.concatenate(logits, axis=1)), recorded(case)["truth_logits"], case)
    for i, (mixer, _) in enumerate(model(case).block_pattern):
        for name in ("conv", "ssm") if mixer == "mamba" else ():
            truth = recorded(case)[f"truth_end_{name}_{i}"]
            np.testing.assert_allclose(numpy(cache[f"block_{i}"][name]), truth, rtol=1e-4, atol=1e-4)


@full("jax", "tensorflow")
@pytest.mark.parametrize("case", LANGUAGE)
def test_decoding_has_the_logits_and_states_of_transformers(case):
    ids = recorded(case)["input_ids"]
    logits, cache = step(case)(ids[:, :5], model(case).init_cache(len(ids), max_length=16))
    logits = [logits]
    for t in range(5, ids.shape[1]):
        y, cache = step(case)(ids[:, t : t + 1], cache)
        logits.append(y)
    close(numpy(ops.concatenate(logits, axis=1)), recorded(case)["dec_logits"], case)
    for i, (mixer, _) in enumerate(model(case).block_pattern):
        state = numpy(cache[f"block_{i}"])
        if mixer == "mamba":
            np.testing.assert_allclose(state["ssm"], recorded(case)[f"dec_end_ssm_{i}"], rtol=1e-4, atol=1e-4)
            # transformers keeps one more column, which nothing reads.
            conv = recorded(case)[f"dec_end_conv_{i}"][..., 1:].swapaxes(1, 2)
            np.testing.assert_allclose(state["conv"], conv, rtol=1e-4, atol=1e-4)
        else:
            for name in ("key", "value"):
                theirs = recorded(case)[f"dec_end_{name}_{i}"].swapaxes(1, 2)
                np.testing.assert_allclose(state[name][:, : ids.shape[1]], theirs, rtol=1e-4, atol=1e-4)


NOT_ON_TENSORFLOW = pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="all models share one loop, and XLA compiles for seconds per model"
)
GREEDY = [pytest.param(x, marks=() if x in ("gqa_leftpad", "mamba1_lm") else NOT_ON_TENSORFLOW) for x in LANGUAGE]


@pytest.mark.parametrize("chunk_size", [512, 2])
@pytest.mark.parametrize("case", GREEDY)
def test_greedy_tokens_equal_transformers_exactly(case, chunk_size):
    inputs = {"token_ids": recorded(case)["gen_input_ids"], "padding_mask": recorded(case)["gen_attention_mask"]}
    given = dict(max_new_tokens=12, stop_token_ids=None, prefill_chunk_size=chunk_size)
    tokens = model(case).generate(inputs, **given)
    mask = np.pad(inputs["padding_mask"].astype(bool), ((0, 0), (0, 12)), constant_values=True)
    np.testing.assert_array_equal(tokens[mask], recorded(case)["gen_tokens"][mask])


def test_a_classifier_has_the_logits_of_transformers():
    arrays = recorded("seqcls")
    inputs = {"token_ids": arrays["input_ids"], "padding_mask": arrays["attention_mask"]}
    np.testing.assert_allclose(numpy(call("seqcls")(inputs)), arrays["logits"], rtol=0, atol=1e-4)


@full("jax")
@pytest.mark.parametrize("case", ["dense", "proj_bias"])
def test_bfloat16_logits_are_near_those_of_transformers(case):
    low = golden_jamba.keras_jamba.JambaCausalLM.from_preset(golden_jamba.FOLDER / case, dtype="bfloat16")
    logits = jitted(low)(recorded(case)["input_ids"])
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    np.testing.assert_allclose(numpy(logits), recorded(case)["bf16_logits"], rtol=0, atol=0.1)


def test_stacked_experts_of_transformers_5_load_the_same_weights():
    import keras_jamba

    stacked = keras_jamba.JambaCausalLM.from_preset(golden_jamba.FOLDER / "gqa_leftpad" / "v5_layout")
    for ours, theirs in zip(stacked.trainable_weights, model("gqa_leftpad").trainable_weights, strict=True):
        np.testing.assert_array_equal(numpy(ours), numpy(theirs))
