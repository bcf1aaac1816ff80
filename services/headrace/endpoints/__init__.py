"""Find the servers behind a name, and spread a client's calls over them."""
