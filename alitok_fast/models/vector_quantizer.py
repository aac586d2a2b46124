"""Vector quantizer of the tokenizer (codebook lookup), with the clustering update of stage 1."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alitok_fast.config import TokenizerConfig
from alitok_fast.models.layers import Embedding
from alitok_fast.models.spread import assign, whole
from alitok_fast.ops.vq_lookup import VQLookup, vq_lookup


class VectorQuantizer(nn.Module):
    """Codebook lookup by plain L2 distance, always in float32; the codebook is `embedding.weight` (K, code_dim)."""

    embed_prob: Tensor
    """(K,) how often each code is used, a moving average; of stage 1 only."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.commitment = config.commitment
        self.usage_decay = config.usage_decay
        self.embedding = Embedding(config.codebook_size, config.code_dim)
        nn.init.uniform_(self.embedding.weight, -1 / config.codebook_size, 1 / config.codebook_size)
        if config.stage == 1:
            self.register_buffer("embed_prob", torch.zeros(config.codebook_size, dtype=torch.float32))

    @property
    def codebook(self) -> Tensor:
        return self.embedding.weight

    def forward(self, z: Tensor) -> VQLookup:
        """z (N, code_dim) -> VQLookup, in float32 whatever autocast says."""
        with torch.autocast(z.device.type, enabled=False):
            return vq_lookup(z.float(), self.codebook.float(), self.commitment)

    @torch.no_grad()
    def cluster_update(self, z: Tensor, vq: VQLookup) -> None:
        """Move rarely used codes towards the closest feature of the batch, in place (stage 1).

        p <- decay p + (1 - decay) usage; d = exp(-p K 10 / (1 - decay) - 1e-3); e <- e (1 - d) + feature d.
        Usage and closest features are taken over all ranks where torch.distributed is initialised.
        """
        usage, codebook = vq.usage.float(), whole(self.codebook)
        features = z[vq.closest].float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(usage)
            features = _closest_over_ranks(features, codebook)
        self.embed_prob.mul_(self.usage_decay).add_(usage / usage.sum(), alpha=1 - self.usage_decay)
        exponent = self.embed_prob * len(codebook) * 10 / (1 - self.usage_decay) + 1e-3
        moved = torch.lerp(codebook, features.to(codebook.dtype), torch.exp(-exponent).unsqueeze(1))
        assign(self.codebook, moved)


def _closest_over_ranks(features: Tensor, codebook: Tensor) -> Tensor:
    """Of every rank's candidate (K, code_dim) for each code, the closest; the lowest rank on a tie."""
    distance = (features - codebook).square().sum(1)
    distances = [torch.empty_like(distance) for _ in range(dist.get_world_size())]
    dist.all_gather(distances, distance)
    mine = torch.stack(distances).argmin(0) == dist.get_rank()
    features = features * mine.unsqueeze(1)
    dist.all_reduce(features)
    return features
