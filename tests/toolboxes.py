"""Classes whose methods are tools, as a user would write them."""

from typing import Literal


class Desk:
    """Orders are looked up and paid back."""

    def __init__(self, currency: str = "EUR"):
        self.currency = currency
        self.closed = 0

    def reset(self, item, orders):
        self._item, self._orders = item, orders
        self.reward, self.done = 0.0, False
        return f"My {item} is broken."

    def orders(self) -> list[str]:
        """Lists all orders."""
        return list(self._orders)

    def look(self, order: str, part: Literal["item", "price"] = "item") -> dict:
        """Tells of an order.

        Args:
            order: Its number.
            part: What to tell.
        """
        if order not in self._orders:
            raise ValueError(f"There is no order {order}.")
        return {"item": self._orders[order]} if part == "item" else {"price": f"3 {self.currency}"}

    def refund(self, order: str, count: int = 1) -> None:
        """Pays back.

        Args:
            order: Its number.
            count: How many of it.
        """
        self.reward, self.done = 0.5 * count * (self._orders[order] == self._item), True

    def _book(self):
        raise AssertionError("no tool")


class Answering:
    """A question is answered in words, after as many calls as one likes; what it holds is closed with it."""

    made = 0

    def __init__(self):
        Answering.made += 1
        self._open = True

    def reset(self, secret):
        assert self._open
        self._secret, self.reward, self.won = secret, 0.0, False

    def hint(self) -> str:
        """Tells the first letter."""
        return self._secret[0]

    def finish(self, text):
        self.won = text == self._secret
        self.reward = 0.3 if self.won else -0.1

    def close(self):
        self._open = False


class Counter:
    """Ends by a message alone; what it earns can be lost again."""

    def reset(self):
        self.reward = 0

    def add(self, number: int):
        """Adds.

        Args:
            number: How much.
        """
        self.reward += number
        return self.reward


class Odd:
    """Does one thing that no class of tools may do."""

    def __init__(self, oddity: str):
        self._oddity = oddity

    def reset(self):
        if self._oddity != "no reward":
            self.reward = {"not reset": 1.0, "nan": 0.0}.get(self._oddity, 0.0)
        self.done = self._oddity == "done at once"
        return 3 if self._oddity == "number" else "Go."

    def act(self):
        """Acts."""
        if self._oddity == "nan":
            self.reward = float("nan")
        if self._oddity == "raises":
            raise KeyError("theirs")
        return object() if self._oddity == "object" else None


class Silent:
    def reset(self): ...

    def steps(self): ...


class Bare:
    """Has nothing to call."""

    def reset(self): ...


class Untyped:
    def reset(self): ...

    def look(self, order):
        """Looks."""
