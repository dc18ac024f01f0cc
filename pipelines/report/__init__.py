"""The report of a run: HTML, tables, charts and the terminal's summary."""
