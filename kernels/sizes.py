"""Whole numbers of tiles, blocks and steps."""


def ceil_div(n: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-n // divisor)


def round_up(n: int, multiple: int) -> int:
    """The next multiple of a number, or the number itself."""
    return ceil_div(n, multiple) * multiple
