"""Amounts of money are whole cents, so that nothing gets lost by rounding."""


def percent(cents, rate):
    """A share of an amount, rounded half up: percent(1999, 10) -> 200."""
    return (cents * rate + 50) // 100


def shown(cents):
    """An amount as people write it: 123456 -> "1,234.56"."""
    return f"{cents // 100:,}.{cents % 100:02}"
