"""Threads that generate, stream and predict with one model get the results of single calls."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from checks import full, once

import keras_jamba
from keras_jamba.models._training_loops import TrainingLoops

THREADS, REQUESTS = 16, 20
SIZES = dict(vocab_size=31, d_model=8, num_layers=2, mamba_ratio=1, moe_frequency=0, num_heads=2, d_ff=8)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaCausalLM(**SIZES)
    model.build((None, None))
    return model


def requests():
    """Returns tuples of hashable arguments of `run`. New lengths compile programs while other threads run."""
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(1, 31, n).tolist()) for n in (3, 12, 60)]
    return [(kind, prompt) for kind in ("generate", "sample", "stream", "predict") for prompt in prompts]


def run(model, kind, prompt):
    prompt = list(prompt)
    if kind == "generate":
        return model.generate(prompt, max_new_tokens=5)
    if kind == "sample":
        return model.generate([prompt, prompt[:2]], max_new_tokens=5, sampler=keras_jamba.Sampler(seed=3))[0]
    if kind == "stream":
        return np.array(list(model.stream(prompt, max_new_tokens=5)))
    return model.predict(np.array([prompt]), verbose=0)


@once
def test_ending_abandoned_loops_waits_for_other_threads(model):
    """Without the lock, two threads that change the owners at the same time could keep one that has ended."""
    loops = TrainingLoops.of(model)

    def abandon():
        loops.owners.append((threading.get_ident(), "fit"))
        began.set()
        loops._end_abandoned()

    began, thread = threading.Event(), threading.Thread(target=abandon)
    with loops.lock:
        thread.start()
        assert began.wait(10)
        thread.join(0.2)
        assert thread.is_alive() and len(loops.owners) == 1
    thread.join(10)
    assert loops.owners == []


@full("jax", "tensorflow")
def test_threads_give_the_results_of_single_calls(model):
    alone = copy.deepcopy(model)
    expected = {request: run(alone, *request) for request in requests()}
    barrier = threading.Barrier(THREADS)

    def work(thread):
        order = np.random.default_rng(thread).permutation(len(expected))
        mine = [list(expected)[i] for i in np.resize(order, REQUESTS)]
        barrier.wait()
        return [(request, run(model, *request)) for request in mine]

    with ThreadPoolExecutor(THREADS) as pool:
        found = [pair for pairs in pool.map(work, range(THREADS)) for pair in pairs]
    assert len(found) == THREADS * REQUESTS and {request for request, _ in found} == set(expected)
    for request, result in found:
        np.testing.assert_allclose(result, expected[request], rtol=1e-4, atol=1e-5, err_msg=str(request))


@full("jax", "tensorflow")
def test_prefill_and_generate_work_while_another_thread_trains(model):
    trained = copy.deepcopy(model)
    trained.compile(keras.optimizers.SGD(0.0))
    ids = np.arange(1, 25).reshape(4, 6)
    started, done = threading.Event(), threading.Event()

    class Waits(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            started.set()
            assert done.wait(300)

    def train():
        trained.fit(ids[:, :-1], ids[:, 1:], batch_size=2, epochs=1, verbose=0, callbacks=[Waits()])

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        try:
            assert started.wait(300)
            state = trained.prefill([1, 2, 3])
            found = trained.generate([1, 2, 3, 4], max_new_tokens=3, state=state)
        finally:
            done.set()
        training.result()
    np.testing.assert_array_equal(found, model.generate([1, 2, 3, 4], max_new_tokens=3))
