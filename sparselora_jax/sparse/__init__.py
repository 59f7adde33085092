"""What a weight can be and how it is multiplied."""
