"""Interrupts at random moments of training, evaluation, generation, saves and loads leave model and files usable."""

import random
import shutil
import signal
import time

import keras
import numpy as np
import pytest
from interrupts import IDS, at_moment, batches, compiled_model, problems, process_state
from writers import equal, leftovers

import keras_jamba
from keras_jamba import training

INTERRUPTS = 50
VALIDATION = (IDS[4:6], IDS[4:6])


def fit(model, folder):
    model.fit(batches(workers=2), epochs=3, verbose=0, validation_data=VALIDATION)


def fit_with_checkpoint(model, folder):
    # A training never resumes from a save that it is beyond.
    shutil.rmtree(folder / "saves", ignore_errors=True)
    data = batches(workers=2)
    model.fit(data, epochs=2, verbose=0, callbacks=[training.Checkpoint(folder / "saves", data, every=1)])


def save_preset(model, folder):
    shutil.rmtree(folder / "preset", ignore_errors=True)
    model.save_to_preset(folder / "preset")


CALLS = {
    "fit": fit,
    "fit with checkpoint": fit_with_checkpoint,
    "evaluate": lambda model, folder: model.evaluate(*VALIDATION, verbose=0),
    "predict": lambda model, folder: model.predict(IDS, verbose=0),
    "generate": lambda model, folder: model.generate([1, 2], max_new_tokens=3),
    "save": lambda model, folder: model.save(folder / "model.keras"),
    "save weights": lambda model, folder: model.save_weights(folder / "model.weights.h5"),
    "save preset": save_preset,
    "load weights": lambda model, folder: model.load_weights(folder / "good.weights.h5"),
    "load preset": lambda model, folder: keras_jamba.JambaCausalLM.from_preset(folder / "good"),
}


@pytest.fixture
def signals():
    """Makes both signals raise in the main thread: as Ctrl-C does, and as handlers of SIGTERM usually do."""

    def ends(number, frame):
        raise SystemExit

    def interrupts(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupts), signal.signal(signal.SIGTERM, ends)
    yield (signal.SIGALRM, signal.SIGTERM)
    signal.signal(signal.SIGALRM, before[0])
    signal.signal(signal.SIGTERM, before[1])


def test_interrupts_at_random_moments_leave_model_and_files_usable(tmp_path, signals):
    draw, model = random.Random(0), compiled_model()
    model.save_weights(tmp_path / "good.weights.h5")
    model.save_to_preset(tmp_path / "good")
    seconds = {}
    for name, call in CALLS.items():
        call(model, tmp_path)  # compiles
        begin = time.perf_counter()
        call(model, tmp_path)
        seconds[name] = time.perf_counter() - begin
    before, found, count = process_state(), [], 0
    assert problems(model, before) == []
    while count < INTERRUPTS:
        name, number = draw.choice(list(CALLS)), draw.choice(signals)
        delay = draw.uniform(0, seconds[name])
        if at_moment(lambda: CALLS[name](model, tmp_path), delay, number) is None:  # noqa: B023, called at once
            continue  # the call was faster than usual
        count += 1
        case = f"{name} after {1000 * delay:.1f} of {1000 * seconds[name]:.1f} ms by {number.name}"
        left = problems(model, before)
        if not left:
            left = file_problems(model, tmp_path)
        found += [f"{case}: {problem}" for problem in left]
        assert found == []
    print(keras.backend.backend(), count, "interrupts", len(found), "failures")
    assert found == []


def file_problems(model, folder):
    """Returns sentences on files that do not load; the next saves leave no leftovers."""
    found = []
    for name, load in {
        "model.keras": lambda path: keras.saving.load_model(path, compile=False),
        "preset": keras_jamba.JambaCausalLM.from_preset,
    }.items():
        try:
            loaded = load(folder / name) if (folder / name).exists() else model
            if not all(np.isfinite(x).all() for x in loaded.get_weights()):
                found.append(f"{name} is not finite")
        except Exception as error:
            found.append(f"{name} cannot be read: {error!r:.200}")
    for name in ("save", "save weights", "save preset"):
        CALLS[name](model, folder)
    loaded = keras_jamba.JambaCausalLM.from_preset(folder / "preset")
    if not equal(loaded.get_weights(), model.get_weights()):
        found.append("the preset has other numbers")
    return found + [f"left: {name}" for name in leftovers(folder) if "saves" not in name]
