"""What the clustering update of the codebook needs, over all micro-batches of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from alitok_fast.models.spread import whole
from alitok_fast.models.vector_quantizer import VectorQuantizer
from alitok_fast.ops.vq_lookup import VQLookup


class Clusters(NamedTuple):
    """Of one micro-batch: how often each code was chosen, its closest feature (K, C) and the squared distance to it."""

    usage: Tensor
    features: Tensor
    distances: Tensor


@torch.no_grad()
def clusters_of(z: Tensor, lookup: VQLookup, codebook: Tensor) -> Clusters:
    """`z` (N, C) are the features that `lookup` looked up in `codebook` (K, C)."""
    features = z.detach()[lookup.closest]
    return Clusters(lookup.usage, features, (features.float() - whole(codebook).float()).square().sum(1))


def update_codebook(quantizer: VectorQuantizer, clusters: Sequence[Clusters]) -> None:
    """One clustering update over all micro-batches, as over one batch of them all; on a tie the first one counts."""
    usage, features, distances = clusters[0]
    for part in clusters[1:]:
        closer = part.distances < distances
        features = torch.where(closer.unsqueeze(1), part.features, features)
        distances = torch.where(closer, part.distances, distances)
        usage = usage + part.usage
    every_code = torch.arange(len(features), device=features.device)
    combined = VQLookup(features, every_code, features.new_zeros(()), usage, every_code)
    quantizer.cluster_update(features, combined)
