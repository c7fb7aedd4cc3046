"""What comes after a model: regions of anomaly maps, suppression of duplicates."""
