"""Other people's checkpoints: their configurations as constructor arguments of ours, their tensors as our weights.

Nothing here imports a model: a model passes in its arguments and its variables.
"""
