"""The backbone against Hugging Face's Jamba: hidden states, router logits, losses, and every gradient."""

import functools

import golden_jamba
import keras
import numpy as np
import pytest
from checks import numpy, variable_gradients
from keras import ops

from keras_jamba.ops import switch_balance_loss, top_k_routing

CASES = ["dense", "moe", "gqa_leftpad", "proj_bias"]


@functools.cache
def prepared(case):
    config, weights, recorded, grads = golden_jamba.read(case)
    model = golden_jamba.backbone(config)
    embedding, head = golden_jamba.load(model, config, weights)
    return config, model, embedding, head, recorded, golden_jamba.stacked(grads)


def forward(model, features):
    """Hidden state after each block and the router's logits, through the layers of the blocks."""
    hidden, routed, x = [], [], features
    for block, (_, kind) in zip(model.blocks, model.block_pattern, strict=True):
        x = x + block.mixer(block.mixer_norm(x))
        inputs = block.feed_forward_norm(x)
        if kind == "moe":
            outputs, routing = block.feed_forward(inputs, return_routing=True)
            routed.append(ops.reshape(routing["logits"], (-1, routing["logits"].shape[-1])))
        else:
            outputs = block.feed_forward(inputs)
        x = x + outputs
        hidden.append(x)
    return hidden, routed


def loss(case):
    """Their loss: next-token cross-entropy, and one balance loss over all layers together."""
    config, model, embedding, head, recorded, _ = prepared(case)
    ids, labels = recorded["input_ids"], recorded["labels"][:, 1:]
    hidden, routed = forward(model, ops.take(embedding, ids, axis=0))
    logits = ops.matmul(model.final_norm(hidden[-1]), ops.transpose(head))[:, :-1]
    counted = ops.convert_to_tensor((labels != -100).astype("float32"))
    targets = ops.convert_to_tensor(np.where(labels == -100, 0, labels).astype("int32"))
    entropy = keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)
    total = ops.sum(entropy * counted) / ops.sum(counted)
    aux = 0.0
    if routed:
        k = config["num_experts_per_tok"]
        _, indices, probabilities = top_k_routing(ops.concatenate(routed, axis=0), k, normalize=False)
        aux = switch_balance_loss(probabilities, indices)
        total = total + config["router_aux_loss_coef"] * aux
    return total, aux


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_logits_equal_transformers(case):
    _, model, embedding, head, recorded, _ = prepared(case)
    features = ops.take(embedding, recorded["input_ids"], axis=0)
    hidden, _ = model.block_outputs(features)
    np.testing.assert_allclose(numpy(ops.stack(hidden)), recorded["hidden_after_layer"], rtol=1e-4, atol=2e-5)
    out = model(features)
    np.testing.assert_allclose(numpy(out), recorded["final_norm"], rtol=1e-4, atol=2e-5)
    logits = numpy(ops.matmul(out, ops.transpose(head)))
    np.testing.assert_allclose(logits, recorded["logits"], rtol=0, atol=1e-4 * max(1, recorded["logits"].std()))


@pytest.mark.parametrize("case", CASES[1:])
def test_router_logits_equal_transformers(case):
    _, model, embedding, _, recorded, _ = prepared(case)
    _, routed = forward(model, ops.take(embedding, recorded["input_ids"], axis=0))
    np.testing.assert_allclose(numpy(ops.stack(routed)), recorded["router_logits"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_transformers(case):
    recorded = prepared(case)[4]
    total, aux = loss(case)
    np.testing.assert_allclose(numpy(total), recorded["loss"], rtol=1e-5)
    if "aux_loss" in recorded:
        np.testing.assert_allclose(numpy(aux), recorded["aux_loss"], atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_equals_transformers(case):
    config, model, embedding, head, _, expected = prepared(case)
    placed = list(golden_jamba.places(model, config))
    assert {id(v) for v, _, _ in placed} == {id(v) for v in model.trainable_variables}
    placed.append((embedding, "model.embed_tokens.weight", np.asarray))
    if head is not embedding:
        placed.append((head, "lm_head.weight", np.asarray))
    actual = variable_gradients(lambda: loss(case)[0], [variable for variable, _, _ in placed])
    for gradient, (_, name, how) in zip(actual, placed, strict=True):
        np.testing.assert_allclose(gradient, how(expected[name]), rtol=1e-4, atol=1e-6, err_msg=name)


def logits_of(case, ids, run):
    """Logits of `run(model, features)`, and the tolerance for them."""
    _, model, embedding, head, recorded, _ = prepared(case)
    features = ops.take(embedding, ids, axis=0)
    return numpy(ops.matmul(run(model, features), ops.transpose(head))), 1e-4 * max(1, recorded["logits"].std())


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_have_the_true_logits(case):
    recorded = prepared(case)[4]
    ids = recorded["truth_segment_ids"].astype("int32")
    logits, tolerance = logits_of(case, recorded["input_ids"], lambda model, x: model(x, segment_ids=ids))
    np.testing.assert_allclose(logits, recorded["truth_packed_logits"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_left_padded_rows_have_the_true_logits(case):
    recorded = prepared(case)[4]
    mask = recorded["lp_attention_mask"].astype(bool)
    logits, tolerance = logits_of(case, recorded["lp_input_ids"], lambda model, x: model(x, padding_mask=mask))
    np.testing.assert_allclose(logits[mask], recorded["truth_lp_logits"][mask], rtol=0, atol=tolerance)
    np.testing.assert_allclose(logits[mask], recorded["lp_solo_logits"][mask], rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_chunked_prefill_has_the_true_logits_and_states(case):
    config, model, _, _, recorded, _ = prepared(case)
    caches = {}

    def run(model, x):
        cache, outputs, begin = model.init_cache(len(x), max_length=16), [], 0
        for end in recorded["truth_chunk_ends"]:
            y, cache = model.step(x[:, begin:end], cache)
            outputs.append(y)
            begin = end
        caches.update(cache)
        return ops.concatenate(outputs, axis=1)

    logits, tolerance = logits_of(case, recorded["input_ids"], run)
    np.testing.assert_allclose(logits, recorded["truth_logits"], rtol=0, atol=tolerance)
    for i, (mixer, _) in enumerate(model.block_pattern):
        if mixer == "mamba":
            for ours, theirs in (("conv", "conv"), ("ssm", "ssm")):
                truth = recorded[f"truth_end_{theirs}_{i}"]
                np.testing.assert_allclose(numpy(caches[f"block_{i}"][ours]), truth, rtol=1e-4, atol=1e-4)
