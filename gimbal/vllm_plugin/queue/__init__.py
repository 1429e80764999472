"""Level `queue` inside vLLM's scheduler: the waiting queue and the step's prefill."""
