"""A character-level GRU language model: data, model, training and sampling; the specification and the CPU op set."""
