"""Compares a candidate scorer with the one in use: logged decisions, estimates, judges and canaries."""
