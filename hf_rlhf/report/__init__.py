"""report.html: one file about a run, or several side by side, that opens offline."""
