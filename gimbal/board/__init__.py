"""What every process of a server sees of its engines: a file in shared memory. Nothing of vLLM."""
