"""Operators: one module each, holding the PyTorch reference, the public function, the fake kernel and the gradient."""
