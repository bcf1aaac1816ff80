"""Check parts of requests, for `headrace.validation`, and read them. No model and no tier is known here."""
