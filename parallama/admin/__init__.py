"""
The admin API: what people and programs do with users, keys, roles, limits and usage over HTTP.

Only Envoy reaches its unix socket. Who calls, and what they may do, is told by authz in headers
(parallama/identity.py); the changes are those of `parallama.db.manage`, as for the command line.
"""
