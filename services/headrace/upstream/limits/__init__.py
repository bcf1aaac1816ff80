"""The limits that an upstream keeps towards the service outside: requests in flight, and per minute."""
