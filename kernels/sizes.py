"""Whole numbers of tiles, blocks and steps."""


def ceil_div(n: int, divisor: int) -> int:
    """n / divisor, rounded up."""
    return -(-n // divisor)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below n."""
    return ceil_div(n, multiple) * multiple
