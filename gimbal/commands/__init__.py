"""One module per command; each holds a click `command` and calls the package that does the work."""
