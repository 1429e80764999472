"""``gimbal serve``: vLLM's OpenAI server, started, watched and taken down as one unit.

`plan` turns the command line into a vLLM command after checking it (no vLLM import, so bad input
answers at once); `supervisor` runs that command; `server` is the process it starts.
"""
