"""The device and its random generators, on PyTorch."""

from pathlib import Path

import torch


def device_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def device_memory():
    if not torch.cuda.is_available():
        return {}
    return {"device_memory": torch.cuda.memory_allocated(), "device_memory_peak": torch.cuda.max_memory_allocated()}


def start_profiler(folder):
    profiler = torch.profiler.profile()
    profiler.start()

    def stop():
        profiler.stop()
        Path(folder).mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(Path(folder) / "trace.json"))

    return stop


def is_out_of_memory(error):
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def get_rng_states():
    # Keras' dropout draws from these generators, regardless of its seed.
    return [torch.get_rng_state().numpy(), *(state.numpy() for state in torch.cuda.get_rng_state_all())]


def set_rng_states(states):
    first, *others = (torch.from_numpy(state) for state in states)
    torch.set_rng_state(first)
    for device, state in enumerate(others[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
