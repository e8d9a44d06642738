"""What a customer buys, and what it costs."""

from shop.money import percent, shown

MANY = 3  # that many pieces of one article are cheaper
DISCOUNT = 10  # per cent


class Basket:
    """The lines of a receipt that is still open."""

    def __init__(self):
        self.lines = []

    def add(self, article, cents, pieces=1):
        """Put some pieces of an article into the basket."""
        self.lines.append((article, cents, pieces))

    def total(self):
        """The price of everything, in cents."""
        return sum(line_total(cents, pieces) for _, cents, pieces in self.lines)

    def receipt(self):
        """A line for each article, then the total."""
        rows = [f"{pieces} x {article}: {shown(line_total(cents, pieces))}"
                for article, cents, pieces in self.lines]
        return "\n".join([*rows, f"total: {shown(self.total())}"])


def line_total(cents, pieces):
    """The price of one line: from MANY pieces on there is a discount."""
    total = cents * pieces
    if pieces > MANY:
        total -= percent(total, DISCOUNT)
    return total
