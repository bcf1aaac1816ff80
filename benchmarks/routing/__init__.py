"""How well the router routes: scores, shares held, and whole answers by real models."""
