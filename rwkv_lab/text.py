"""Values as text for people: in tables, reports and figures."""


def shown(value: object) -> str:
    """A cell as text: four digits of a float, thousands of an int set apart, no control characters."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def counted(number: int, what: str, plural: str = "") -> str:
    """A number with what it counts: "1 tensor", "2,000 tensors".

    Args:
        what: one of them, "tensor", or with its verb, "tensor is".
        plural: several of them, "matrices" or "tensors are"; empty: `what` and an s.
    """
    return f"{number:,} {what if number == 1 else plural or f'{what}s'}"
