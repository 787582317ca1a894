"""What stands in front of Hotswap: a small HTTP client, a load generator, and the command line.

`http` and `load` speak HTTP only. The command line alone may reach into the home folder: it works without a server.
"""
