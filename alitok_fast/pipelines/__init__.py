"""Whole tasks on top of the models: labels to pictures, photographs to tokens and back, large runs."""
