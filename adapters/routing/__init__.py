"""The router: which alias a request belongs to when its `model` is `auto`. Knows no HTTP."""
