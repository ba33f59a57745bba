"""Moving bytes between members."""
