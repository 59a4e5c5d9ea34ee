"""Generation from a prompt state, with attention sinks."""

import keras

import keras_jamba


def test_a_prompt_state_of_a_model_with_sinks_continues():
    keras.utils.set_random_seed(0)
    sizes = dict(vocab_size=20, d_model=16, num_layers=2, num_heads=2, mamba_ratio=0, moe_frequency=0)
    model = keras_jamba.JambaCausalLM(**sizes, attention_window=8, attention_sinks=2)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    expected = model.generate([*prompt, 4], max_new_tokens=5)
    assert list(model.generate([*prompt, 4], max_new_tokens=5, state=model.prefill(prompt))) == list(expected)
