"""Good files are read exactly; a bad row is named by file, line, field and value."""

from pathlib import Path

import pytest

from gimbal.core.errors import InputError
from gimbal.workloads import load_trace
from gimbal.workloads.jsonl import read as read_jsonl
from gimbal.workloads.jsonl import write as write_jsonl

BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
OWN = '{"arrival_s": 1, "prompt_tokens": 20, "output_tokens": 2'
MOON = '{"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": '


def write(tmp_path: Path, name: str, text: str) -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


GOOD = [
    (
        "burst.csv",
        BURST + "5,ChatGPT,472,18,490,Conversation log\n9.5,GPT-4,10,0,10,API log\n"
        "7,GPT-4,30,4,34,API log\n",
        [(0.0, 472, 18, None, ()), (2.0, 30, 4, None, ())],
    ),
    (
        "azure.csv",
        AZURE + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.1805900,396,109\n",
        [(0.0, 374, 44, None, ()), (0.5, 396, 109, None, ())],
    ),
    (
        "moon.jsonl",
        MOON + "[0, 7]}\n\n" + MOON.replace("3000", "6000") + "[0, 9]}\n",
        [(0.0, 600, 5, None, (0, 7)), (3.0, 600, 5, None, (0, 9))],
    ),
    (
        "own.jsonl",
        OWN + "}\n" + OWN + ', "session": "a", "prefix_blocks": [4, 5]}\n',
        [(0.0, 20, 2, None, ()), (0.0, 20, 2, "a", (4, 5))],
    ),
    (
        "lengths.json",
        '{"data": [{"input_length": 3, "output_length": 4}]}',
        [(0.0, 3, 4, None, ())],
    ),
    (
        "lengths.csv",
        "num_prefill_tokens,num_decode_tokens\n8,9\n",
        [(0.0, 8, 9, None, ())],
    ),
]


@pytest.mark.parametrize(("name", "text", "expected"), GOOD, ids=[row[0] for row in GOOD])
def test_reads(tmp_path: Path, name: str, text: str, expected: list) -> None:
    trace = load_trace(write(tmp_path, name, text))
    got = [
        (r.arrival_s, r.prompt_tokens, r.output_tokens, r.session, r.prefix_blocks)
        for r in trace.requests
    ]
    assert [row[0] for row in got] == pytest.approx([row[0] for row in expected], abs=1e-6)
    assert [row[1:] for row in got] == [row[1:] for row in expected]
    assert trace.has_arrivals == ("lengths" not in name)


BAD = [
    ("burst.csv", BURST + "5,X,472,18,490,API\n6,X,many,18,490,API\n", ":3: Request tokens='many'"),
    ("burst.csv", BURST + "-5,X,472,18,490,API\n", ":2: Timestamp='-5'"),
    ("burst.csv", BURST + "nan,X,472,18,490,API\n", ":2: Timestamp='nan'"),
    ("burst.csv", BURST + "1,X,4.5,18,490,API\n", ":2: Request tokens='4.5'"),
    ("burst.csv", BURST + "1,X,,18,490,API\n", ":2: Request tokens=''"),
    ("burst.csv", BURST + "1,X,4,18,490,API,more\n", ":2: row="),
    ("azure.csv", AZURE + "yesterday,374,44\n", ":2: TIMESTAMP='yesterday'"),
    ("azure.csv", AZURE + "2023-11-16 18:15:46.68,374,0\n", ":2: GeneratedTokens='0'"),
    ("azure.csv", AZURE + "2023-11-16 18:15:46.68,374\n", ":2: GeneratedTokens=None"),
    ("moon.jsonl", MOON + "[0, 1, 2]}\n", ":1: hash_ids=3"),
    ("moon.jsonl", MOON + "[0, true]}\n", ":1: hash_ids=True"),
    ("moon.jsonl", MOON + "[0]}\n" + MOON + "[0\n", ":2: not JSON"),
    ("own.jsonl", OWN + "}\n[1]\n", ":2: row="),
    ("own.jsonl", OWN + ', "sesion": "a"}\n', "did you mean 'session'"),
    ("own.jsonl", OWN + ', "prefix_blocks": [1, 2, 3]}\n', ":1: prefix_blocks=3"),
    ("own.jsonl", '{"arrival_s": 1, "prompt_tokens": 0, "output_tokens": 2}\n', "prompt_tokens=0"),
    ("lengths.json", '{"data": [{"input_length": 3}]}', ":1: output_length=None"),
    ("lengths.json", '{"rows": []}', "a list 'data'"),
    ("what.csv", "a,b\n1,2\n", "unknown trace format"),
    ("empty.csv", AZURE, "no usable request"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_row_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(InputError) as caught:
        load_trace(path)
    assert str(caught.value).startswith(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_data_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gimbal.workloads.load.data_directories", lambda: [tmp_path])
    with pytest.raises(InputError, match="set GIMBAL_DATA"):
        load_trace("mooncake")
    with pytest.raises(InputError, match="did you mean 'burstgpt'"):
        load_trace("burstgbt")


def test_gimbal_data_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "azure2023"
    folder.mkdir()
    (folder / "AzureLLMInferenceTrace_conv.csv").write_text(AZURE + "2023-11-16 18:15:46,5,6\n")
    monkeypatch.setenv("GIMBAL_DATA", str(tmp_path))
    trace = load_trace("azure-conv")
    assert trace.name == "azure-conv"
    assert [(r.prompt_tokens, r.output_tokens) for r in trace.requests] == [(5, 6)]


def test_own_format_round_trips(tmp_path: Path) -> None:
    text = '{"prefix_block_tokens": 8}\n' + OWN + ', "domain": "code", "prefix_blocks": [4, 5]}\n'
    first = read_jsonl(Path(write(tmp_path, "a.jsonl", text)))
    assert first.prefix_block_tokens == 8
    write_jsonl(first, tmp_path / "c.jsonl")
    again = read_jsonl(tmp_path / "c.jsonl")
    assert again.requests == first.requests
    assert again.prefix_block_tokens == 8
