"""Level `dispatch` inside vLLM's front end: the hook, KV events, sessions, metrics."""
