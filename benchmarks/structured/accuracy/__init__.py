"""Measures whether answers in an enforced form are right more often than the same answers without."""
