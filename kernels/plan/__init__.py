"""Which variant of a kernel runs on a GPU at some sizes, how its work is cut, and why.

Plain arithmetic on data sheets: nothing here launches, compiles or needs a GPU.

    costs.py           what a predicted time is made of
    gpus.py            the GPUs known by name, and the terms of each generation
    products.py        matrix products: variant, tile, split along K
    recurrence.py      the recurrence, forward and backward: persistent or stepwise; groups, splits, registers
    generation.py      writing text: persistent, batched or stepwise
    training_step.py   a training step: each launch, what it is predicted to take, and what bounds it
"""
