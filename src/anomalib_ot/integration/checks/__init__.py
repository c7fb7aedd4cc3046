"""What users hand in is checked here, and errors are told in one line."""
