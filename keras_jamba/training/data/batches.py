"""Batches of arrays or indexable objects, in an order that depends on seed and epoch only."""

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import numpy as np

from keras_jamba import _keras_internals
from keras_jamba._typing import Tensors
from keras_jamba.ops import _checks
from keras_jamba.training.data._ahead import EpochCache, Prefetcher

# Purposes of random numbers. Each has its own stream.
ORDER, TRANSFORM, AUGMENTATION = range(3)

# A function of a batch and a random generator that returns the batch to use.
Transform: TypeAlias = Callable[[Tensors, np.random.Generator], Tensors]


class Batches(keras.utils.PyDataset):
    """Shuffled batches for `fit`, `evaluate` and custom loops, a pure function of seed and step.

    `batch(step)` is that function. Earlier draws and batches, the backend and the number of workers have no effect.
    The pass of epoch `epoch` takes `steps_per_epoch` steps from `epoch * steps_per_epoch`. It yields each example once,
    in an order that depends on seed and epoch. `fit` gets exactly these batches in sequence. `fit(shuffle=True)` has no
    effect: it would reorder them with Python's global generator.

    The pass of the next epoch follows without any callback. To resume a training, call
    `begin_epoch(epoch, step_in_epoch)`, at the latest in a callback's `on_epoch_begin`. The next pass then belongs to
    `epoch` and skips its first `step_in_epoch` batches. Later passes are complete. `len` is always `steps_per_epoch`,
    and Keras expects this number of steps. In a shorter pass Keras warns that the input ran out of data, and continues
    with the next epoch.

    An object serves one `fit` at a time. Do not pass `steps_per_epoch` to `fit`.

    `class_names` of the data object are kept, and `DHCJamba.fit` adopts them.

    Args:
        data: `x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)`. Each is an array, or nested dicts and tuples of arrays,
            with one first axis of examples; other arrays are converted to NumPy. Or an object with a length that
            returns one example per integer, such as a list. Examples are arrays, numbers or nested structures of them,
            which are stacked.
        batch_size: examples per batch.
        seed: integer, 0 or more.
        shuffle: whether each epoch has its own order. False keeps the order of the data.
        transform: a function of a batch and a `numpy.random.Generator` that returns the batch to use, or None. The
            generator depends on seed and step only. With several workers the function runs in several threads.
        drop_last: whether an epoch leaves out its last, incomplete batch. With shuffling the dropped examples differ
            per epoch. All batches then have one shape, which is compiled once. Pass False to evaluate on all examples.
        workers: threads that prefetch batches. 0 and 1 make each batch on request. Threads suffice, because NumPy and
            pillow release the interpreter lock.
        max_queue_size: batches that several workers may hold.
        shard: `(index, count)` of this process if `count` processes train together, as in `DataParallel.shard`. The
            process reads every `count`-th example of each batch, from number `index` on. batch_size then is that of all
            processes together, and all batches are complete.

    Raises:
        ValueError: for arguments out of range, arrays of different lengths, and less data than one batch.

    Example:
        >>> import numpy as np
        >>> from keras_jamba.training.data import Batches
        >>> batches = Batches((np.arange(10.0), np.arange(10)), batch_size=4, seed=1)
        >>> len(batches), batches.batch(0)[0].shape
        (2, (4,))
    """

    # Whether a subclass completes the last batch itself.
    _fills = False

    def __init__(
        self,
        data: Any,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        transform: Transform | None = None,
        drop_last: bool = True,
        workers: int = 1,
        max_queue_size: int = 10,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("max_queue_size", max_queue_size, 1)):
            _checks.check_integer(name, value, least)
        for name, value in dict(seed=seed, workers=workers).items():
            _checks.check_integer(name, value, at_least=0)
        if transform is not None and not callable(transform):
            raise ValueError(
                "transform must be a function of a batch and a random generator. Received: "
                f"transform={transform!r}. Pass for example lambda batch, rng: batch."
            )
        super().__init__(workers=workers, max_queue_size=max_queue_size)
        self.batch_size, self.seed, self.shuffle = int(batch_size), int(seed), shuffle
        self.transform, self.shard = transform, _checked_shard(shard, batch_size, drop_last or self._fills)
        self.num_examples, self._take = _reader(data)
        self.class_names = getattr(data, "class_names", None)
        self.steps_per_epoch = _steps(self.num_examples, self.batch_size, drop_last)
        self._order = EpochCache(self._ordered)
        self._ahead = Prefetcher(self.batch, workers, max_queue_size) if workers > 1 else None
        self._pass = (0, 0)
        self._phase, self._adapter_known = "idle", False
        # Whether `fit` has read a batch since `begin_epoch`, for `Checkpoint`.
        self._was_read = False

    def batch(self, step: int) -> Tensors:
        """Returns the batch of a step, a pure function of step and seed.

        Args:
            step: integer, 0 or more, counted from the start of training. Its epoch is `step // steps_per_epoch`.

        Returns:
            The structure of the data, with NumPy arrays whose first axis is the batch.

        Raises:
            ValueError: if step is not an integer of 0 or more.
        """
        _checks.check_integer("step", step, at_least=0)
        epoch, place = divmod(int(step), self.steps_per_epoch)
        index, count = self.shard
        chosen = self._order(epoch)[place * self.batch_size :][: self.batch_size][index::count]
        return self._transformed(self._examples(chosen, epoch), int(step))

    def begin_epoch(self, epoch: int, step_in_epoch: int = 0) -> None:
        """Sets the epoch of the next pass, and skips its first `step_in_epoch` batches.

        Raises:
            ValueError: if epoch is not an integer of 0 or more, or step_in_epoch is not an integer from 0 to
                `steps_per_epoch - 1`.
        """
        for name, value in dict(epoch=epoch, step_in_epoch=step_in_epoch).items():
            _checks.check_integer(name, value, at_least=0)
        if step_in_epoch >= self.steps_per_epoch:
            raise ValueError(
                f"step_in_epoch must be below steps_per_epoch={self.steps_per_epoch}. Received: step_in_epoch="
                f"{step_in_epoch}. After the last batch of an epoch begin the next: begin_epoch({epoch + 1})."
            )
        self._pass, self._was_read = (int(epoch), int(step_in_epoch)), False

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __getitem__(self, index: int) -> Tensors:
        """Returns the batch at `index` of the current or next pass. Skipped batches do not count.

        Raises:
            IndexError: after the last batch of the pass.
        """
        epoch, left_out = self._coming()
        if not 0 <= index < self.steps_per_epoch - left_out:
            raise IndexError(
                f"The index of a batch in this pass must be from 0 to {self.steps_per_epoch - left_out - 1}. "
                f"Received: {index}. For any step of the training call batch(step)."
            )
        step = epoch * self.steps_per_epoch + left_out + int(index)
        self._was_read = True
        if self._ahead is None:
            return self.batch(step)
        return self._ahead.batch(step, end=(epoch + 1) * self.steps_per_epoch)

    # Keras' data adapter uses the members down to on_epoch_end. `fit` creates the adapter, may take a batch to build
    # the model, and resets the adapter, which calls on_epoch_end. The passes come after that.

    @property
    def num_batches(self) -> int:
        return self.steps_per_epoch - self._coming()[1]

    @property
    def workers(self) -> int:
        """Threads that prefetch batches.

        Keras' adapter reads this property while it is created and gets 0, because its own queue mixes passes. The
        adapter also holds the `shuffle` of `fit`, which this property switches off: no other hook reaches it.
        """
        adapter = _keras_internals.asking_adapter(self, depth=1)
        if adapter is None:
            return _keras_internals.dataset_workers(self)
        adapter.shuffle = False
        if self._phase == "passing":
            self._advance()
        self._phase, self._adapter_known = "arriving", True
        return 0

    def on_epoch_begin(self) -> None:
        if not self._adapter_known:
            warnings.warn(
                "Batches does not know the data adapter of this version of Keras, "
                f"{keras.__version__}, which may change the order of batches. Pass shuffle=False to fit.",
                stacklevel=2,
            )
        if self._phase != "arriving":
            self._phase = "passing"

    def on_epoch_end(self) -> None:
        if self._phase == "passing":
            self._advance()
        self._phase = "idle"

    def _coming(self):
        """Returns the epoch of the next pass, and the number of skipped batches.

        While an adapter is created the latter is 0: the adapter counts the batches once, for all passes.
        """
        epoch, left_out = self._pass
        return epoch, 0 if self._phase == "arriving" else left_out

    def _advance(self):
        self._pass = (self._pass[0] + 1, 0)

    def _ordered(self, epoch):
        if not self.shuffle:
            return np.arange(self.num_examples)
        return self._random(ORDER, epoch).permutation(self.num_examples)

    def _examples(self, chosen, epoch):
        """Returns the batch of the examples with indices `chosen`. Subclasses may override it."""
        return self._take(chosen)

    def _transformed(self, batch, step):
        if self.transform is None:
            return batch
        return self.transform(batch, self._random(TRANSFORM, step))

    def _random(self, purpose, number):
        index = self.shard[0] if purpose != ORDER else 0
        return np.random.default_rng((self.seed, purpose, number, index))


def _checked_shard(shard, batch_size, drop_last):
    index, count = shard
    if count > 1 and not drop_last:
        raise ValueError(
            "Processes that train together need equal parts of each batch. "
            f"Received: shard={tuple(shard)}, drop_last=False. Leave drop_last at True."
        )
    if not (0 <= index < count and batch_size % count == 0):
        raise ValueError(
            "shard must be (index, count) with 0 <= index < count, and batch_size a multiple of count. "
            f"Received: shard={tuple(shard)}, batch_size={batch_size}. Pass `DataParallel.shard`, another batch_size."
        )
    return int(index), int(count)


def _steps(num_examples, batch_size, drop_last):
    steps = num_examples // batch_size if drop_last else -(-num_examples // batch_size)
    if steps == 0:
        raise ValueError(
            "The data must fill a batch. Received: "
            f"{num_examples} examples, batch_size={batch_size}, drop_last={drop_last}. "
            "Lower batch_size, or pass drop_last=False if there is any data."
        )
    return steps


def _reader(data):
    """Returns `(count, take)`: the number of examples, and a function from indices to a batch."""
    if not isinstance(data, (tuple, dict)) and not hasattr(data, "shape"):
        return _reader_of_examples(data)
    if isinstance(data, tuple) and len(data) not in (1, 2, 3):
        raise ValueError(
            "A tuple of data must be (x,), (x, y) or (x, y, sample_weight). "
            f"Received: a tuple of {len(data)}. Put several inputs into a dict or a tuple of their own."
        )
    leaves = keras.tree.flatten(data)
    wrong = [type(x).__name__ for x in leaves if not getattr(x, "shape", ())]
    if wrong or not leaves:
        raise ValueError(
            "The data must be arrays with a first axis of examples. Received: "
            f"{', '.join(wrong) or 'none'} among {len(leaves)} parts. Convert lists with numpy.asarray, and leave "
            "out None values."
        )
    lengths = [len(x) for x in leaves]
    if len(set(lengths)) > 1:
        raise ValueError(
            "All arrays must have equally many examples on their first axis. Received: "
            f"shapes {', '.join(str(tuple(x.shape)) for x in leaves)}. Check which array belongs to other data."
        )
    arrays = keras.tree.map_structure(lambda x: x if isinstance(x, np.ndarray) else np.asarray(x), data)
    return lengths[0], lambda chosen: keras.tree.map_structure(lambda x: np.asarray(x[chosen]), arrays)


def _reader_of_examples(data):
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise ValueError(
            "The data must be arrays, or an object with a length that returns an example per integer. "
            f"Received: data={data!r}. Convert an iterator to a list, or implement __len__ and __getitem__."
        )

    def take(chosen):
        examples = [data[int(i)] for i in chosen]
        return keras.tree.map_structure(lambda *parts: np.stack(parts), *examples)

    return len(data), take
