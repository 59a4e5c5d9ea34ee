"""Modes of a captured training step that code outside of the step can find."""

import threading

from torch.overrides import TorchFunctionMode


class StepMode(TorchFunctionMode):
    """A mode of PyTorch functions. `current` finds the innermost one of a subclass in this thread."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._of_thread = threading.local()

    @classmethod
    def current(cls):
        active = getattr(cls._of_thread, "modes", ())
        return active[-1] if active else None

    def __enter__(self):
        self._of_thread.modes = [*getattr(self._of_thread, "modes", ()), self]
        return super().__enter__()

    def __exit__(self, *error):
        self._of_thread.modes = self._of_thread.modes[:-1]
        return super().__exit__(*error)
