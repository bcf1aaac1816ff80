"""Format amounts of money for people."""

from __future__ import annotations


def money(amount: float) -> str:
    """Format an amount with two decimal places, more if it is small: "12.30", "0.0042", "1.2e-06"."""
    if amount == 0 or amount >= 1:
        return f"{amount:,.2f}"
    return f"{amount:.4f}" if amount >= 0.001 else f"{amount:.2g}"
