"""One engine's state: signals, the derived scheduler that feeds them, where they are published."""
