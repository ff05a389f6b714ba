"""Counter-based randomness: which views an epoch has, and every random parameter of a view."""
