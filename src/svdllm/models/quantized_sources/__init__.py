"""Models that are stored quantised by others, read as the dense models that they stand for."""
