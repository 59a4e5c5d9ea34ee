"""Trainer functions that several backends share."""

import contextlib


class Loop:
    def __init__(self, kind):
        self.kind, self.checked, self.has_begun = kind, False, False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def sync(self):
        pass


@contextlib.contextmanager
def readable_values(variables):
    yield variables


def with_cuda_graph(model, step):
    return step


def on_weights_replaced(layer):
    pass


def can_bypass_layer_call(layer, *args, **kwargs):
    return False


def has_call_hooks(layer):
    return False


def runs_step_without_data():
    return False


def local_batch(data):
    return data
