"""Limits per tenant: requests, tokens, streams and cost.

`limits` reads the file of limits. `accounts` has the budget of each tenant, and `keeper` takes from them. If
several routers share the limits, one of them keeps the budgets and the others lease slices: `holder` has the
slices of this process, `sharing` finds the keeper and leases. `admission` is what a request meets.
"""
