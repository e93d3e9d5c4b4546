"""How far two predictions over a large vocabulary are apart, without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgepeft.cross_entropy import chunks, logits_of, times

_HELD = 6  # matrices of logits that are alive at once


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """½ KL(p‖q) + ½ KL(q‖p), summed over the rows, in nats, of the distributions with logits (rows, classes)."""
    log_p, log_q = first.float().log_softmax(-1), second.float().log_softmax(-1)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()


def linear_divergence(
    first: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None = None
) -> Tensor:
    """The same of two states that one frozen head reads: their logits are ``state @ weight.T + bias``.

    Gradients are computed chunk by chunk in the forward pass, as in ``linear_cross_entropy``.

    Args:
        first, second: (positions, width).
        weight: (vocabulary, width).
        bias: (vocabulary,), or None.
        softcap: logits x become softcap · tanh(x / softcap).
    """
    return _LinearDivergence.apply(first, second, weight, bias, softcap)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
    ) -> Tensor:
        gradients = [torch.empty_like(state) for state in (first, second)]
        total = torch.zeros((), dtype=torch.float32, device=first.device)
        for part in chunks(len(first), _HELD * len(weight)):
            logits = [logits_of(state[part], weight, bias) for state in (first, second)]
            slopes = None
            if softcap is not None:
                bent = [value.div_(softcap).tanh_() for value in logits]
                slopes = [1 - value.square() for value in bent]
                logits = [value.mul_(softcap) for value in bent]
            log_p, log_q = (value.sub_(value.logsumexp(-1, keepdim=True)) for value in logits)
            p, q = log_p.exp(), log_q.exp()
            apart = log_p.sub_(log_q)
            del logits, log_p, log_q
            total += 0.5 * (p - q).mul_(apart).sum()
            # With d = log p - log q the derivative by a logit of the first is ½ (p - q + p (d - Σ p d)),
            # by one of the second -½ (p - q + q (d - Σ q d)).
            for number, (own, sign) in enumerate(((p, 0.5), (q, -0.5))):
                centred = apart - (own * apart).sum(-1, keepdim=True)
                gradient = centred.mul_(own).add_(p).sub_(q).mul_(sign)
                if slopes is not None:
                    gradient.mul_(slopes[number])
                gradients[number][part] = times(gradient, weight)
                del centred, gradient, own
            del p, q, apart, slopes
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        ctx.gradients = None  # in place below, and freed as soon as the caller is done with them
        return (*(g.mul_(grad[0].to(g.dtype)) for g in gradients), None, None, None)
