"""Batches of arrays, or of whatever can be indexed, in an order that seed and step decide."""

import warnings

import keras
import numpy as np

from keras_jamba import _keras_internals
from keras_jamba.ops import _checks
from keras_jamba.training.data._ahead import Ahead, Latest

# What random numbers are drawn for: each purpose has a stream of its own.
ORDER, TRANSFORM, AUGMENTATION = range(3)


class Batches(keras.utils.PyDataset):
    """Shuffled batches for `fit`, `evaluate` and loops of one's own, a pure function of seed and step.

    `batch(step)` is that function: nothing drawn or made before has a part in it, on no backend and with no number
    of workers. Pass number `epoch` takes the steps from `epoch * steps_per_epoch`, in which every example comes once,
    in an order that seed and epoch decide. `fit` gets exactly these batches one after the other: its `shuffle=True`,
    which would reorder them with Python's global generator, does nothing here.

    A pass that ends is followed by that of the next epoch, without any callback. What resumes a training calls
    `begin_epoch(epoch, step_in_epoch)`, at the latest in `on_epoch_begin` of a callback: the pass that is to come is
    then number `epoch`, its first `step_in_epoch` batches are left out, and the passes after it are whole.
    `len` is always `steps_per_epoch`, and so are the steps that Keras expects: in a shorter pass it warns that the
    input ran out of data, and goes on with the next epoch.

    An object serves one `fit` at a time; leave the `steps_per_epoch` of `fit` away.

    Where the data object has `class_names`, so has this one, and `DHCJamba.fit` takes them over.

    Args:
        data: `x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)`, each an array or nested dicts and tuples of arrays
            whose first axis, the examples, is equally long; arrays that are not NumPy's are converted. Or an object
            with a length that gives one example for an integer, a list for example: arrays, numbers or nested
            structures of them, which are stacked.
        batch_size: examples in a batch.
        seed: integer, 0 or more.
        shuffle: whether each epoch has an order of its own; otherwise all have that of the data.
        transform: a function of a batch and a `numpy.random.Generator`, itself a pure function of seed and step,
            that returns the batch that is handed out; or None. With several workers it runs in several threads.
        drop_last: whether the examples that do not fill a batch are left out, each epoch others; all batches then
            have one shape, which is compiled once. Pass False to evaluate on all there are.
        workers: threads that make batches ahead; 0 and 1 make each when it is asked for. Processes are not used:
            NumPy and pillow let other threads run.
        max_queue_size: batches that several workers may hold.
        shard: `(index, count)` where `count` processes train together and each reads its part of each batch, as
            `DataParallel` says: every `count`-th example from number `index` on. batch_size is that of the whole, and
            all batches are whole ones.

    Raises:
        ValueError: for arguments out of range, arrays of different lengths, and less data than a batch.

    Example:
        >>> import numpy as np
        >>> from keras_jamba.training.data import Batches
        >>> batches = Batches((np.arange(10.0), np.arange(10)), batch_size=4, seed=1)
        >>> len(batches), batches.batch(0)[0].shape
        (2, (4,))
    """

    # Whether a subclass fills the last batch up by itself.
    _fills = False

    def __init__(
        self,
        data,
        batch_size,
        seed=0,
        shuffle=True,
        transform=None,
        drop_last=True,
        workers=1,
        max_queue_size=10,
        shard=(0, 1),
    ):
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
        self._order = Latest(self._ordered)
        self._ahead = Ahead(self.batch, workers, max_queue_size) if workers > 1 else None
        self._pass = (0, 0)
        self._phase, self._adapter_known = "idle", False

    def batch(self, step):
        """The batch of a step counted from the beginning of training: a pure function of it and the seed.

        Args:
            step: integer, 0 or more; of the epoch `step // steps_per_epoch`.

        Returns:
            The structure of the data, NumPy arrays whose first axis is the batch.

        Raises:
            ValueError: if step is not such an integer.
        """
        _checks.check_integer("step", step, at_least=0)
        epoch, place = divmod(int(step), self.steps_per_epoch)
        index, count = self.shard
        chosen = self._order(epoch)[place * self.batch_size :][: self.batch_size][index::count]
        return self._transformed(self._examples(chosen, epoch), int(step))

    def begin_epoch(self, epoch, step_in_epoch=0):
        """Makes the pass that is to come number `epoch`, without its first `step_in_epoch` batches.

        Raises:
            ValueError: if epoch is not an integer of 0 or more, or step_in_epoch is none below `steps_per_epoch`.
        """
        for name, value in dict(epoch=epoch, step_in_epoch=step_in_epoch).items():
            _checks.check_integer(name, value, at_least=0)
        if step_in_epoch >= self.steps_per_epoch:
            raise ValueError(
                f"step_in_epoch must be below steps_per_epoch={self.steps_per_epoch}. Received: step_in_epoch="
                f"{step_in_epoch}. After the last batch of an epoch begin the next: begin_epoch({epoch + 1})."
            )
        self._pass = (int(epoch), int(step_in_epoch))

    def __len__(self):
        return self.steps_per_epoch

    def __getitem__(self, index):
        """The batch at place `index` of the pass that is under way or to come, those left out not counted.

        Raises:
            IndexError: after the last batch of the pass.
        """
        epoch, left_out = self._coming()
        if not 0 <= index < self.steps_per_epoch - left_out:
            raise IndexError(
                f"A batch of this pass has a place from 0 to {self.steps_per_epoch - left_out - 1}. "
                f"Received: {index}. For any step of the training call batch(step)."
            )
        step = epoch * self.steps_per_epoch + left_out + int(index)
        if self._ahead is None:
            return self.batch(step)
        return self._ahead.batch(step, end=(epoch + 1) * self.steps_per_epoch)

    # From here to on_epoch_end: what Keras' adapter asks and says. A fit makes an adapter, may take a batch to build
    # the model, and resets the adapter, which says on_epoch_end; only then come the passes.

    @property
    def num_batches(self):
        return self.steps_per_epoch - self._coming()[1]

    @property
    def workers(self):
        """Threads that make batches ahead.

        Keras' adapter, which asks while it is made, is told 0, because its own queue mixes up passes; and it is where
        the `shuffle` of `fit` arrives, of which there is no other way to hear.
        """
        adapter = _keras_internals.asking_adapter(self, depth=1)
        if adapter is None:
            return _keras_internals.dataset_workers(self)
        adapter.shuffle = False
        if self._phase == "passing":
            self._advance()
        self._phase, self._adapter_known = "arriving", True
        return 0

    def on_epoch_begin(self):
        if not self._adapter_known:
            warnings.warn(
                "Batches does not know the data adapter of this version of Keras, "
                f"{keras.__version__}, which may change the order of batches. Pass shuffle=False to fit.",
                stacklevel=2,
            )
        if self._phase != "arriving":
            self._phase = "passing"

    def on_epoch_end(self):
        if self._phase == "passing":
            self._advance()
        self._phase = "idle"

    def _coming(self):
        """The number of the pass, and how many of its batches are left out.

        While an adapter arrives these are none: how many batches it then counts is how many each pass has for it.
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
        """The batch of the examples at the places `chosen` in an epoch; for subclasses too."""
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
            "The data must fill a batch at least. Received: "
            f"{num_examples} examples, batch_size={batch_size}, drop_last={drop_last}. "
            "Lower batch_size, or pass drop_last=False where there is any data."
        )
    return steps


def _reader(data):
    """`(count, take)`: how many examples there are, and a function from their places to a batch."""
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
            "out what is None."
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
            "The data must be arrays, or an object with a length that gives an example for an integer. "
            f"Received: data={data!r}. Make a list of what comes one by one, or give it __len__ and __getitem__."
        )

    def take(chosen):
        examples = [data[int(i)] for i in chosen]
        return keras.tree.map_structure(lambda *parts: np.stack(parts), *examples)

    return len(data), take
