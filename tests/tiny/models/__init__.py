"""One module per kind of model; each defines `CASES`, found by itself."""
