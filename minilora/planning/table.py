"""Numbers and lines of a plan as text."""


def table_row(name: str, cells: list[str], width: int = 42, cell_width: int = 14) -> str:
    """Lay out a line of a table."""
    return f"{name:<{width}}" + "".join(f"  {cell:>{cell_width - 2}}" for cell in cells)


def format_bytes(num_bytes: int) -> str:
    """Format a number of bytes in GiB, or, if it is less than 0.1 GiB, in MiB."""
    if num_bytes == 0:
        return "-"
    if num_bytes < 2**30 / 10:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:.1f} GiB"


def format_seconds(seconds: float) -> str:
    """Format a duration in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 120 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 96 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.0f} days"


def rounded_down(tokens: int) -> int:
    """Round a number of tokens down to two digits: it is an estimate."""
    unit = 10 ** max(0, len(str(tokens)) - 2)
    return tokens // unit * unit
