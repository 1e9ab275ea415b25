"""Numbers as people read them: written in one way in the prose, the tables and the figures of a report."""

SHARE = "share"  # the unit of what is shown in percent


def percent(share: float) -> str:
    """0.1234 as `12.3 %`; shares below one percent keep two digits that count."""
    value = 100 * share
    return f"{value:.2g} %" if abs(value) < 1 else f"{value:.1f} %"


def readable(value: float | None, unit: str = "") -> str:
    """A number with about three digits, a share in percent."""
    if value is None:
        return "–"
    if unit == SHARE:
        return percent(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if value == int(value):
        return f"{value:.0f}"
    if size < 0.001:
        return f"{value:.1e}"
    return f"{value:.{3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0}f}"


def margin_beside(text: str, margin: float, unit: str = "") -> str:
    """Half of an interval with as many decimals as the number beside it, the `text` of `readable`, and at least one
    unit of the last of them."""
    if "e" in text:
        return readable(margin, unit)
    decimals = len(text.removesuffix(" %").partition(".")[2])
    margin = 100 * margin if unit == SHARE else margin
    return f"{max(margin, 10.0**-decimals) if margin else 0:,.{decimals}f}"


def with_interval(value: float | None, low: float | None, high: float | None, unit: str = "") -> str:
    """`12.3 % (10.1 % to 14.0 %)`, without the brackets where there is no interval."""
    if low is None or high is None:
        return readable(value, unit)
    return f"{readable(value, unit)} ({readable(low, unit)} to {readable(high, unit)})"
