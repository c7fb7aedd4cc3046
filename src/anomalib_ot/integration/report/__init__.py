"""The report of a run: its table of results, what they say together, and the page that shows it."""
