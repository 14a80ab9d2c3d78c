"""The error of a model without a usable list of blocks."""


class UnsupportedModelError(ValueError):
    """No list of transformer blocks that can be skipped was found in a model."""
