"""From a file of conversations to a published adapter version. Meets the server only in the registry and the store."""
