"""The command line `hotswap`: a file a group of commands. Heavy libraries are imported inside the commands."""
