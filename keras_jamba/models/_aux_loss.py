"""The auxiliary loss that all expert layers of a model share."""

from keras import ops

from keras_jamba.ops.routing import finite_routing


def shared_aux_loss(router, routings, mask):
    """Returns one auxiliary loss over the tokens of all expert layers.

    Args:
        router: the `Router` that computes the loss.
        routings: a list with the routing decisions of each layer, as `MoELayer` returns them.
        mask: `(b, t)` bool, False for padding, or None.
    """
    flat = lambda x: ops.reshape(x, (-1, x.shape[-1]))  # noqa: E731
    joined = {
        name: ops.concatenate([flat(routing[name]) for routing in routings])
        for name in ("logits", "probabilities", "weights", "indices")
    }
    mask = None if mask is None else ops.tile(ops.reshape(mask, (-1,)), len(routings))
    return router.auxiliary_loss(finite_routing(joined), mask)
