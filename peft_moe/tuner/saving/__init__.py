"""A mixture on disk: saving, loading, and the checks of a load."""
