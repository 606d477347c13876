"""The embedding predictor: a one-block resampler from an LLM layer's states to a teacher's features.

Source: arXiv 2412.09585; its block is the Perceiver resampler of Flamingo and OpenFlamingo.
"""

import torch
import torch.nn.functional as F
from torch import nn


def match_queries(queries: torch.Tensor, num_queries: int) -> torch.Tensor:
    """Brings queries (B, Q, H) to (B, num_queries, H): tiled when Q divides, else their mean repeated."""
    given = queries.shape[1]
    if given == num_queries:
        return queries
    if num_queries % given:
        queries = queries.mean(dim=1, keepdim=True)
    return queries.repeat(1, num_queries // queries.shape[1], 1)


class EmbeddingPredictor(nn.Module):
    """Predicts the features of one teacher from the states of one LLM layer.

    One input projection serves keys and queries; one cross-attention from the queries to keys and queries; one
    feed-forward; one output projection with LayerNorm. No positional encoding and no dropout, so that leaving a key out
    of `key_mask` equals leaving it out of `keys`.

    Args:
        llm_width: H, width of keys and queries.
        out_width: D, width of the predicted features.
        num_queries: n, number of predicted tokens.
        width: d, inner width; `out_width` when None.
        latent: own n learnt queries of width d, which skip the input projection (probes, and runs without task tokens).
        heads, head_width: attention heads and the width of each.
        ff_mult: hidden width of the feed-forward, in units of d.
    """

    def __init__(
        self,
        llm_width: int,
        out_width: int,
        num_queries: int,
        *,
        width: int | None = None,
        latent: bool = False,
        heads: int = 4,
        head_width: int = 32,
        ff_mult: int = 1,
    ) -> None:
        super().__init__()
        width = out_width if width is None else width
        attention_width = heads * head_width
        self.num_queries = num_queries
        self.heads = heads
        self.in_proj = nn.Linear(llm_width, width)
        self.key_norm = nn.LayerNorm(width)
        self.query_norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, attention_width, bias=False)
        self.kv = nn.Linear(width, 2 * attention_width, bias=False)
        self.attn_out = nn.Linear(attention_width, width, bias=False)
        self.ff_norm = nn.LayerNorm(width)
        self.ff1 = nn.Linear(width, ff_mult * width, bias=False)
        self.ff2 = nn.Linear(ff_mult * width, width, bias=False)
        self.out = nn.Linear(width, out_width)
        self.out_norm = nn.LayerNorm(out_width)
        self.latents = nn.Parameter(torch.empty(1, num_queries, width)) if latent else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Own parameters only (the layers within reset their own): latents are normal, divided by sqrt(d)."""
        if self.latents is not None:
            nn.init.normal_(self.latents, std=self.latents.shape[-1] ** -0.5)

    def forward(
        self,
        keys: torch.Tensor,
        queries: torch.Tensor | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predicted features (B, n, D).

        Args:
            keys: (B, K, H) states of the LLM layer.
            queries: (B, Q, H), or (1, Q, H) when all samples share them (projected once then); None with latents.
            key_mask: bool (B, K), True where a key may be attended; None for all. The queries, which are appended to
                the keys, are always attended, so a row without any key stays finite.
        """
        if (queries is None) == (self.latents is None):
            raise ValueError("a predictor takes queries, or has latents of its own: exactly one of the two")
        batch = keys.shape[0]
        if queries is None:
            x = self.latents
        else:
            x = self.in_proj(match_queries(queries, self.num_queries))  # [B or 1, n, d]
        keys_normed = self.key_norm(self.in_proj(keys))  # [B, K, d]
        x_normed = self.query_norm(x)
        kv_queries = self.kv(x_normed).expand(batch, -1, -1)
        k, v = torch.cat([self.kv(keys_normed), kv_queries], dim=1).chunk(2, dim=-1)
        q = self.q(x_normed).expand(batch, -1, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, heads, ., head_width]
        mask = None
        if key_mask is not None:
            mask = F.pad(key_mask, (0, self.num_queries), value=True)[:, None, None, :]  # [B, 1, 1, K+n]
        # Fused kernels keep the softmax in float32 whatever the dtype of q, k and v.
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.attn_out(attended.transpose(1, 2).flatten(2))
        x = x + self.ff2(F.gelu(self.ff1(self.ff_norm(x))))
        return self.out_norm(self.out(x))
