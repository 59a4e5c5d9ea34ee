"""Interrupts at random moments of training, evaluation, generation, saves and loads leave model and files usable."""

import collections
import itertools
import random
import shutil
import signal
import time

import keras
import numpy as np
import pytest
import records
from interrupts import IDS, at_moment, batches, compiled_model, problems, process_state
from writers import equal, leftovers

import keras_jamba
from keras_jamba import training

INTERRUPTS = 50
VALIDATION = (IDS[4:6], IDS[4:6])


# Each function prepares a call, and returns it with the model that it changes.


def fit(model, folder):
    return model, lambda: model.fit(batches(workers=2), epochs=3, verbose=0, validation_data=VALIDATION)


def first_fit(model, folder):
    """The backend compiles the steps."""
    return fit(compiled_model(), folder)


def fit_with_checkpoint(model, folder):
    # A training never resumes from a save that it is beyond.
    shutil.rmtree(folder / "saves", ignore_errors=True)
    data = batches(workers=2)
    saves = training.Checkpoint(folder / "saves", data, every=1)
    return model, lambda: model.fit(data, epochs=2, verbose=0, callbacks=[saves])


def save_preset(model, folder):
    shutil.rmtree(folder / "preset", ignore_errors=True)
    return model, lambda: model.save_to_preset(folder / "preset")


CALLS = {
    "fit": fit,
    "first fit": first_fit,
    "fit with checkpoint": fit_with_checkpoint,
    "evaluate": lambda model, folder: (model, lambda: model.evaluate(*VALIDATION, verbose=0)),
    "predict": lambda model, folder: (model, lambda: model.predict(IDS, verbose=0)),
    "generate": lambda model, folder: (model, lambda: model.generate([1, 2], max_new_tokens=3)),
    "save": lambda model, folder: (model, lambda: model.save(folder / "model.keras")),
    "save weights": lambda model, folder: (model, lambda: model.save_weights(folder / "model.weights.h5")),
    "save preset": save_preset,
    "load weights": lambda model, folder: (model, lambda: model.load_weights(folder / "good.weights.h5")),
    "load preset": lambda model, folder: (model, lambda: keras_jamba.JambaCausalLM.from_preset(folder / "good")),
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


def duration(name, model, folder):
    call, begin = CALLS[name](model, folder)[1], time.perf_counter()
    call()
    return time.perf_counter() - begin


# Python ignores an interrupt in a destructor or a callback of the garbage collector, and warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_at_random_moments_leave_model_and_files_usable(tmp_path, signals):
    draw, model, cases, ignored = random.Random(0), compiled_model(), [], 0
    model.save_weights(tmp_path / "good.weights.h5")
    model.save_to_preset(tmp_path / "good")
    # The first call compiles.
    seconds = {name: [duration(name, model, tmp_path) for _ in range(2)][1] for name in CALLS}
    before = process_state()
    assert problems(model, before) == []
    for name in itertools.islice(itertools.cycle(CALLS), 4 * INTERRUPTS):
        if len(cases) == INTERRUPTS:
            break
        changed, call = CALLS[name](model, tmp_path)
        number, delay = draw.choice(signals), draw.uniform(0, seconds[name])
        ended = at_moment(call, delay, number)
        if ended is None:  # the call was faster than before, or Python ignored the interrupt
            ignored += 1
            continue
        keras_jamba.JambaCausalLM.from_preset(tmp_path / "good")  # its paths must fit the file
        found = problems(changed, before)
        if name.startswith("save"):
            found += file_problems(model, tmp_path)
        cases.append({"call": name, "ms": round(1000 * delay, 1), "by": ended.__name__, "failures": found})
        print(cases[-1], flush=True)
    failures = sum(bool(case["failures"]) for case in cases)
    counts = collections.Counter(case["call"] for case in cases)
    figures = {"interrupts": len(cases), "failures": failures, "ended before the interrupt": ignored}
    records.write(f"interrupts_{keras.backend.backend()}", figures | {"calls": dict(counts), "cases": cases})
    assert len(cases) == INTERRUPTS and failures == 0 and min(counts[name] for name in CALLS) > 1


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
        CALLS[name](model, folder)[1]()
    loaded = keras_jamba.JambaCausalLM.from_preset(folder / "preset")
    if not equal(loaded.get_weights(), model.get_weights()):
        found.append("the preset has other numbers")
    return found + [f"left: {name}" for name in leftovers(folder) if "saves" not in name]
