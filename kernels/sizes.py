"""Numbers of tiles, blocks and steps, and of bytes in words."""


def ceil_div(n: int, divisor: int) -> int:
    """n / divisor, rounded up."""
    return -(-n // divisor)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below n."""
    return ceil_div(n, multiple) * multiple


def kib(size: float) -> str:
    """Bytes, as a number of KiB."""
    return f"{size / 2**10:.0f} KiB"
