"""A character-level GRU language model; the NumPy op set here is the specification that the CUDA kernels are held to."""
