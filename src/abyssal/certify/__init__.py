"""What was measured of a reconstructed step."""
