"""What comes before and after a model: resize and normalization, scores and maps, suppression of duplicates."""
