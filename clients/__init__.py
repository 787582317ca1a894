"""What stands in front of Hotswap: the typed client (`sdk`), a load generator, and the command line.

All but the command line speak HTTP only; that may reach into the home folder, since it works without a server.
"""
