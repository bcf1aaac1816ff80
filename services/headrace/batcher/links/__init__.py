"""Connects the batcher to its workers: one stream per worker, liveness, circuit breaking, failover."""
