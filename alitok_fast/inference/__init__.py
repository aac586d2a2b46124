"""Sampling and decoding at speed: models packed for it, the loop, graphs, memory."""
