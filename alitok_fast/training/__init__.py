"""Training of the tokenizer (stages 1 and 2) and of the generator."""
