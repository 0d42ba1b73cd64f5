"""What any Python project might hold: files, text, progress, statistics. It knows no network."""
