"""Report on a run, as an HTML page with tables and charts, and on the terminal."""
