"""What an operator reaches over HTTP: the live page, status and control."""
