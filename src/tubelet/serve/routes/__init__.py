"""The operations of the API, one module per kind of thing. Each has a `router`; `app` puts them together."""
