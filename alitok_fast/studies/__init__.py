"""Experiments that train several models and compare them."""
