"""``gimbal doctor``: is this machine, this Python and this vLLM what Gimbal needs?

`findings` holds the result type, `software`, `machine` and `surroundings` the checks,
`seams_report` the comparison of every symbol Gimbal relies on with a vLLM source tree. Nothing
here imports vLLM.
"""
