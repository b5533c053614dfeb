"""What makes a GPU fast, and nothing else does: masks as its kernels want them, recorded steps.

Nobody has run this on a GPU yet: it is written from documentation, and tested as far as a CPU can.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q kᵀ / √d + mask) v: q (N, K, m, d), k and v (N, K, L, d), mask (N or 1, 1, m, L) in
    q's dtype."""
    mask = mask.expand(q.shape[0], -1, -1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class StepRecorder:
    """Runs a decoding step, and from the third time on replays it as a CUDA graph.

    On a GPU the launches of a step cost more than its work. A replay launches everything at once,
    with the same tensors at the same places. So a step must read and write fixed tensors only, a
    step of other sizes is another recording, and once a tensor has moved all are forgotten."""
    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """The tensors have moved: recordings would go on reading the old ones."""
        self.graphs = {}
        self.pool = torch.cuda.graph_pool_handle()    # a pool ends with its last graph

    def run(self, step, *sizes) -> None:
        """step(*sizes): as it stands the first time (its warm-up), then recorded, then replayed."""
        if sizes not in self.graphs:
            step(*sizes)
            self.graphs[sizes] = None
            return
        if self.graphs[sizes] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):    # records, and does not run
                step(*sizes)
            self.graphs[sizes] = graph
        self.graphs[sizes].replay()
