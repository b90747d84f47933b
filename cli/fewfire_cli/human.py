"""Numbers as people read them."""


def size(n: float) -> str:
    """Bytes in decimal units, as disks are sold: 98.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.95 or unit == "GB":
            break
        n /= 1000
    return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"


def count(n: float) -> str:
    """A number of parameters: 134.5 M."""
    for unit in ("", " k", " M", " B"):
        if n < 999.95 or unit == " B":
            break
        n /= 1000
    return f"{n:.0f}" if not unit else f"{n:.1f}{unit}"
