"""What reads records and draws: metrics, comparisons, tables, charts, the HTML page."""
