"""The coordinator's rule of combination in torch, to train with: what is trained is what will be served.

Shared by the built-in models' networks. Needs torch.
"""

from __future__ import annotations

from torch import Tensor, nn, softmax


def mix(gate: nn.Module, experts: nn.ModuleList, rows: Tensor, top_k: int, classes: int) -> tuple[Tensor, Tensor]:
    """Rows [N, ...] to (probabilities [N, classes] mixed from each row's top_k experts, gate scores [N, experts]).

    Gate and experts give logits; only the rows that chose an expert are put to it.
    """
    scores = softmax(gate(rows), dim=1)
    top, chosen = scores.topk(top_k, dim=1)
    weights = top / top.sum(dim=1, keepdim=True)
    mixed = weights.new_zeros(len(rows), classes)
    for number, expert in enumerate(experts):
        where, slots = (chosen == number).nonzero(as_tuple=True)
        if len(where):
            answer = softmax(expert(rows[where]), dim=1)
            mixed = mixed.index_add(0, where, weights[where, slots, None] * answer)
    return mixed, scores


def balance_loss(scores: Tensor, top_k: int) -> Tensor:
    """1 when all experts get equal work, up to their number when one gets all (arXiv 2101.03961, equation 4, for top-k)."""
    experts = scores.shape[1]
    chosen = scores.topk(top_k, dim=1).indices
    share = chosen.flatten().bincount(minlength=experts) / chosen.numel()
    return experts * (share * scores.mean(dim=0)).sum()
