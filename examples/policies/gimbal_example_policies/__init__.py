"""One dispatch policy, one queue ordering and one placer: docs/writing-a-policy.md."""
