"""Flash attention by plain loops over the rows: what PyTorch's CUDA kernel computes from rows laid
end to end (aten._flash_attention_forward and its backward), with what that kernel refuses.

Letters: n queries and m keys of all rows, or of one; H query heads, K key heads, S = H / K, d head
size.
"""
import torch


def rows_of(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, seqused_k=None):
    """Of each row: the slices of its queries and of its keys."""
    refused = {
        "int32 cum_seq": cum_seq_q.dtype != torch.int32 or cum_seq_k.dtype != torch.int32,
        "int32 seqused_k": seqused_k is not None and seqused_k.dtype != torch.int32,
        "a head size that is a multiple of 8, up to 256": q.shape[2] % 8 or q.shape[2] > 256,
        "q, k and v of one dtype": not q.dtype == k.dtype == v.dtype,
        "groups of heads that are whole": q.shape[1] % k.shape[1],
        "numbers of a head next to each other": any(x.stride(2) != 1 for x in (q, k, v)),
        "as many rows of keys as of queries": len(cum_seq_q) != len(cum_seq_k)}
    for what, is_wrong in refused.items():
        if is_wrong:
            raise RuntimeError(f"flash attention wants {what}")
    starts_q, starts_k = cum_seq_q.tolist(), cum_seq_k.tolist()
    for row in range(len(starts_q) - 1):
        queries = slice(*starts_q[row:row + 2])
        keys = slice(*starts_k[row:row + 2])
        if seqused_k is not None:
            keys = slice(keys.start, keys.start + int(seqused_k[row]))
        if queries.stop - queries.start > max_q or keys.stop - keys.start > max_k:
            raise RuntimeError("flash attention: a row is longer than max_q or max_k")
        yield queries, keys


def in_groups(x, K):
    """(n, H, d) -> (n, K, S, d) in fp32"""
    return x.float().unflatten(1, (K, -1))


def weights_of(q, k, causal, scale):
    """q (n, K, S, d), k (m, K, d) -> weights (K, S, n, m) and log-sums (K, S, n) in fp32.

    Causal is bottom-right: the last query sees all keys. A query that sees none has weights of 0,
    and +inf for its log-sum, as the kernel says."""
    n, m = len(q), len(k)
    hidden = torch.full((n, m), causal).triu(m - n + 1)
    scores = (torch.einsum("nksd,mkd->ksnm", q, k) * scale).masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1).masked_fill(hidden, 0)
    return weights, scores.logsumexp(-1).masked_fill(hidden.all(-1), torch.inf)


def forward(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
            *, scale=None, seqused_k=None):
    """q (n, H, d), k and v (m, K, d) -> out (n, H, d), lse (H, n), and three that nobody reads."""
    assert dropout_p == 0 and not return_debug_mask
    K = k.shape[1]
    scale = scale or q.shape[2]**-0.5
    out = q.new_zeros(q.shape)
    lse = torch.zeros(q.shape[1], len(q))
    for rows, keys in rows_of(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, seqused_k):
        p, log_sums = weights_of(in_groups(q[rows], K), k[keys].float(), is_causal, scale)
        out[rows] = torch.einsum("ksnm,mkd->nksd", p, v[keys].float()).flatten(1, 2).to(q.dtype)
        lse[:, rows] = log_sums.flatten(0, 1)
    return out, lse, torch.zeros(2, dtype=torch.int64), torch.zeros(0), torch.zeros(0)


def backward(grad, q, k, v, out, lse, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
             rng_state, unused, *, scale=None):
    """Gradients of q, k and v. With p the weights: dL/dscores = p (dL/dp − Σ dL/dout · out)."""
    K = k.shape[1]
    scale = scale or q.shape[2]**-0.5
    of_q, of_k, of_v = (torch.zeros(x.shape) for x in (q, k, v))
    for rows, keys in rows_of(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k):
        row_q, row_grad, row_out = (in_groups(x[rows], K) for x in (q, grad, out))
        row_k, row_v = k[keys].float(), v[keys].float()
        p, _ = weights_of(row_q, row_k, is_causal, scale)
        of_p = torch.einsum("nksd,mkd->ksnm", row_grad, row_v)
        delta = (row_grad * row_out).sum(-1).permute(1, 2, 0)[..., None]
        of_scores = p * (of_p - delta) * scale
        of_q[rows] = torch.einsum("ksnm,mkd->nksd", of_scores, row_k).flatten(1, 2)
        of_k[keys] += torch.einsum("ksnm,nksd->mkd", of_scores, row_q)
        of_v[keys] += torch.einsum("ksnm,nksd->mkd", p, row_grad)
    return of_q.to(q.dtype), of_k.to(q.dtype), of_v.to(q.dtype)
