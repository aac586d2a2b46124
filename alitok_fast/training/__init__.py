"""Training of the tokenizer (stages 1 and 2) and of the generator; here, what a training loop of one's own needs."""

from alitok_fast.training.clusters import clusters_of, update_codebook
from alitok_fast.training.layers import checkpoint_activations, layers_of
from alitok_fast.training.losses import (
    adversarial_loss,
    auxiliary_loss,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)

__all__ = [
    "adversarial_loss",
    "auxiliary_loss",
    "checkpoint_activations",
    "clusters_of",
    "discriminator_loss",
    "generator_loss",
    "layers_of",
    "reconstruction_loss",
    "update_codebook",
]
