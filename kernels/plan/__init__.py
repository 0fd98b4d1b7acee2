"""Which variant of a kernel runs on a GPU at some sizes, how its work is cut, and why.

Plain arithmetic on data sheets: nothing here launches, compiles or needs a GPU.

    gpus.py         the GPUs known by name, and what a multiprocessor of each generation does per cycle
    products.py     matrix products: variant, tile, split along K
    recurrence.py   the recurrence, forward and backward: persistent or stepwise; groups, splits, registers
    generation.py   writing text: persistent, batched or stepwise
"""
