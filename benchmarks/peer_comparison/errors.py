"""What can go wrong in a comparison."""

from shared.errors import SeedrlError


class ComparisonError(SeedrlError):
    """The comparison cannot be made or cannot go on."""
