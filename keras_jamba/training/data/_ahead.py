"""Prefetching of batches, and values computed once per epoch."""

import threading
from concurrent.futures import ThreadPoolExecutor


class Prefetcher:
    """A prefetcher whose threads make batches ahead of their step.

    Keras' queue hands leftovers of an interrupted pass to the next one. This prefetcher looks batches up by step, so
    a pass never gets another's batch.

    Args:
        make: a thread-safe function from a step to its batch.
        workers: threads.
        depth: batches that may be held or in progress.
    """

    def __init__(self, make, workers, depth):
        self._make, self._depth = make, depth
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="keras_jamba_batches")
        self._futures, self._lock = {}, threading.Lock()

    def batch(self, step, end):
        """Returns the batch of `step`, and starts later ones up to `depth` in all and before `end`."""
        wanted = range(step, min(step + self._depth, end))
        with self._lock:
            for other in [other for other in self._futures if other not in wanted]:
                self._futures.pop(other).cancel()
            for later in wanted:
                if later not in self._futures:
                    self._futures[later] = self._pool.submit(self._make, later)
            future = self._futures.pop(step)
        return future.result()


class EpochCache:
    """A thread-safe cache of `make(epoch)` for the latest epoch."""

    def __init__(self, make):
        self._make, self._held = make, (None, None)

    def __call__(self, epoch):
        held = self._held
        if held[0] != epoch:
            held = self._held = (epoch, self._make(epoch))
        return held[1]
