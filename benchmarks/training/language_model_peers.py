"""Peer of `benchmarks.training.language_model`: training of Hugging Face's Jamba, also alone in a process.

    python -m benchmarks.training.language_model_peers FOLDER ROUNDS

`language_model` writes FOLDER: it has `tiny` and `large`, each with config.json and tokens.npy. This module adds the
weights of the tiny model. Prints the facts of `prepared` and the seconds per step as JSON.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import JambaConfig, JambaForCausalLM

from benchmarks import measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RATE, STEPS = 0.03, 3


def missing():
    """Returns the error of importing the peer's GPU kernels, or None."""
    if DEVICE == "cpu":
        return None
    try:
        import causal_conv1d  # noqa: F401
        import mamba_ssm.ops.selective_scan_interface  # noqa: F401
        import mamba_ssm.ops.triton.selective_state_update  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def descent(folder):
    """Writes weights to the folder and returns the losses of a few steps of plain gradient descent in float32."""
    model = _model(folder, experts="eager").to(DEVICE)
    model.save_pretrained(folder)
    optimizer, tokens, losses = torch.optim.SGD(model.parameters(), RATE), _tokens(folder), []
    for _ in range(STEPS):
        loss = _loss(model, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Training:
    """Training steps in bfloat16, where fused AdamW updates float32 master weights.

    Autocast is not used. It would pass inputs of two dtypes to the scan's kernel, which is an error, and multiply
    grouped experts in float32. All weights are bfloat16, and each step copies the master weights to them.
    """

    def __init__(self, folder):
        with torch.device(DEVICE):
            self.model = _model(folder, experts="grouped_mm")
        self.weights = list(self.model.parameters())
        self.masters = [weight.detach().clone() for weight in self.weights]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.model.bfloat16()
        self.optimizer = torch.optim.AdamW(self.masters, 1e-4, weight_decay=0.1, fused=True)
        self.tokens = _tokens(folder)

    @property
    def parameters(self):
        return sum(weight.numel() for weight in self.weights)

    def steps(self, count):
        """Runs steps, waits for the last one, and returns its loss."""
        return [self._step() for _ in range(count)][-1].item()

    def _step(self):
        loss = _loss(self.model, self.tokens)
        loss.backward()
        torch._foreach_copy_([master.grad for master in self.masters], [weight.grad for weight in self.weights])
        self.model.zero_grad()
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        return loss.detach()


def _model(folder, experts):
    torch.manual_seed(0)
    config = JambaConfig.from_pretrained(folder, attn_implementation="sdpa", experts_implementation=experts)
    return JambaForCausalLM(config).float().train()


def _tokens(folder):
    return torch.as_tensor(np.load(Path(folder) / "tokens.npy"), dtype=torch.int64, device=DEVICE)


def _loss(model, tokens):
    """Returns the cross-entropy of each token after the first, plus the balance loss of all routers."""
    targets = tokens[:, 1:].contiguous()
    given = dict(labels=targets, shift_labels=targets, output_router_logits=True, use_cache=False)
    return model(tokens[:, :-1], **given).loss


def prepared(folder):
    """Returns facts and steps of the peer.

    They are `({"descent", "parameters"}, {"Hugging Face": STEPS steps of the large model})`, or `({"missing": reason},
    {})`.
    """
    if missing():
        return {"missing": missing()}, {}
    from benchmarks.training.language_model import STEPS

    losses, training = descent(folder / "tiny"), Training(folder / "large")
    return {
        "descent": {"rate": RATE, "losses": losses},
        "parameters": training.parameters,
    }, {"Hugging Face": lambda: training.steps(STEPS)}


def main(folder, rounds):
    facts, functions = prepared(Path(folder))
    for steps in functions.values():
        from benchmarks.training.language_model import STEPS

        facts["peak"] = measure.extra_device_memory(steps, backend="torch")
        facts["seconds"] = measure.interleaved(functions, int(rounds))["Hugging Face"] / STEPS
        facts["loss"] = steps()
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
