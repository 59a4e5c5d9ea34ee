"""Peers of `benchmarks.moe.cpu`: mixtures of experts of other libraries."""

import torch
from keras_hub.src.models.mixtral.mixtral_decoder import MixtralSparseMoeBlock
from transformers import JambaConfig
from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock


def keras_hub_block(experts, per_token, d, hidden):
    """Returns keras-hub's Mixtral block as a function of `(tokens, router, up_bank, down_bank, gate_bank)`."""
    block = MixtralSparseMoeBlock(d, hidden, experts, per_token)
    block.build((None, None, d))

    def mixture(tokens, router, up_bank, down_bank, gate_bank):
        (y, *_), _ = block.stateless_call([router, gate_bank, up_bank, down_bank], [], tokens[None])
        return y[0]

    return mixture


class HuggingFace:
    """The Jamba block of transformers on PyTorch, with its loop over the experts and unnormalised weights."""

    def __init__(self, arrays, per_token):
        tokens, router, up, down, gate, weight = (torch.tensor(x) for x in arrays)
        config = JambaConfig(
            hidden_size=tokens.shape[1],
            intermediate_size=up.shape[2],
            num_experts=len(up),
            num_experts_per_tok=per_token,
            experts_implementation="eager",
        )
        self.block, self.weight = JambaSparseMoeBlock(config), weight
        with torch.no_grad():
            self.block.router.weight.copy_(router.T)
            self.block.experts.gate_up_proj.copy_(torch.cat([gate, up], dim=2).mT)
            self.block.experts.down_proj.copy_(down.mT)
        self.tokens = tokens.requires_grad_(True)

    def forward_and_gradient(self):
        def forward():
            with torch.no_grad():
                return self.block(self.tokens[None])[0]

        def gradient():
            block = self.block
            leaves = [self.tokens, block.router.weight, block.experts.gate_up_proj, block.experts.down_proj]
            loss = (block(self.tokens[None])[0] * self.weight).sum()
            tokens, router, gate_up, down = torch.autograd.grad(loss, leaves)
            gate, up = gate_up.mT.chunk(2, dim=2)
            return tokens, router.T, up, down.mT, gate

        return forward, gradient
