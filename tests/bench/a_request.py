"""One request as a benchmark's client saw it, for tests to change."""

from gimbal.records.schema import RequestRecord

REQUEST = RequestRecord(
    request_id="",
    arm="",
    repeat=0,
    arrival_s=0.0,
    sent_s=0.0,
    prompt_tokens=8,
    output_tokens=3,
    expected_output_tokens=3,
    first_token_s=0.1,
    last_token_s=0.3,
)
