"""The flow on batchers' streams: how fast they are read, how many sequences they hold, when tokens are sent."""
