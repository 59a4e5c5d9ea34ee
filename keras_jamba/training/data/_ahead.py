"""What is made before it is asked for, and what is made once an epoch."""

import threading
from concurrent.futures import ThreadPoolExecutor


class Ahead:
    """Batches that threads make before they are asked for.

    Keras' own queue hands what a pass that was broken off has left over to the next one. Here a batch is found by
    its step, so that nothing can be handed out in the place of another.

    Args:
        make: a function from a step to its batch, for several threads at a time.
        workers: threads.
        depth: batches that may be held or in the making.
    """

    def __init__(self, make, workers, depth):
        self._make, self._depth = make, depth
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="keras_jamba_batches")
        self._futures, self._lock = {}, threading.Lock()

    def batch(self, step, end):
        """The batch of `step`; those up to `end`, exclusive, are begun."""
        wanted = range(step, min(step + self._depth, end))
        with self._lock:
            for other in [other for other in self._futures if other not in wanted]:
                self._futures.pop(other).cancel()
            for later in wanted:
                if later not in self._futures:
                    self._futures[later] = self._pool.submit(self._make, later)
            future = self._futures.pop(step)
        return future.result()


class Latest:
    """`make(epoch)`, of which the latest is kept; for several threads at a time."""

    def __init__(self, make):
        self._make, self._held = make, (None, None)

    def __call__(self, epoch):
        held = self._held
        if held[0] != epoch:
            held = self._held = (epoch, self._make(epoch))
        return held[1]
