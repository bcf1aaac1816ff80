"""Run the services on hosts of their own, as network namespaces of this machine, behind a real DNS name.

`network` makes hosts, links and packet filters; `names` is the name server; `services` runs the processes of
a mesh on the hosts; `policies` imitates NetworkPolicies; `scenarios` has what is tried, each in a process on
the caller's host; `test_cluster` runs them.
"""
