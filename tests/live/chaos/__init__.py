"""What is killed, frozen, truncated, filled and flooded while requests are served.

``python -m tests.live.chaos`` starts demo servers one after another, brings each fault about while
short requests are sent, and prints one table: requests sent, completed exactly, failed by vLLM
alone in the same fault, failed by Gimbal. It exits with 1 unless the last column is 0 everywhere,
the accounts return to zero, and a server that lost a process ends with an error and leaves nothing.
"""
