"""Every format is read exactly, by its content; a bad row is named by file, line, field, value."""

import json
from pathlib import Path

import pytest

from gimbal.core.errors import InputError
from gimbal.workloads import Trace, TraceOptions, load_trace
from gimbal.workloads.fields import records
from gimbal.workloads.formats import BINARY, FORMATS
from gimbal.workloads.jsonl import read as read_jsonl
from gimbal.workloads.jsonl import write as write_jsonl
from tests.workloads.samples import SAMPLES, TEXT, Expected, Sample, chat, jsonl

BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
OWN = '{"arrival_s": 1, "prompt_tokens": 20, "output_tokens": 2'
MOON = '{"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": '
BATCH = '{"custom_id": "1", "body": '


def write(tmp_path: Path, name: str, text: str) -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def requests(trace: Trace) -> list[Expected]:
    return [
        (r.arrival_s, r.prompt_tokens, r.output_tokens, r.session, r.prefix_blocks)
        for r in trace.requests
    ]


def same(trace: Trace, expected: list[Expected]) -> None:
    got = requests(trace)
    assert [row[0] for row in got] == pytest.approx([row[0] for row in expected], abs=1e-6)
    assert [row[1:] for row in got] == [row[1:] for row in expected]


@pytest.mark.parametrize("sample", SAMPLES, ids=[sample.format for sample in SAMPLES])
@pytest.mark.parametrize("suffix", ["", ".txt"])
def test_reads(tmp_path: Path, sample: Sample, suffix: str) -> None:
    trace = load_trace(write(tmp_path, f"trace{suffix}", sample.text))
    same(trace, sample.requests)
    form = next(form for form in FORMATS if form.name == sample.format)
    assert trace.has_arrivals == (form.arrival is not None)
    notes = " ".join(trace.notes)
    assert sample.note in notes
    assert sample.format in notes or form.read is not None


def test_every_format_has_a_sample_that_it_alone_takes(tmp_path: Path) -> None:
    assert {sample.format for sample in SAMPLES} == {form.name for form in FORMATS}
    for sample in SAMPLES:
        keys, _ = records(Path(write(tmp_path, "x", sample.text)))
        assert next(form.name for form in FORMATS if form.fits(keys)) == sample.format


JSON_LINES = [s for s in SAMPLES if s.text.startswith("{") and s.text.count("\n") > 1]


@pytest.mark.parametrize("sample", JSON_LINES, ids=[sample.format for sample in JSON_LINES])
def test_json_lines_may_as_well_be_a_list(tmp_path: Path, sample: Sample) -> None:
    """A Mooncake file named .json, for one; a header line and an indented document are neither."""
    try:
        items = [json.loads(line) for line in sample.text.splitlines()]
    except ValueError:
        return
    same(load_trace(write(tmp_path, "t.json", json.dumps(items, indent=1))), sample.requests)


def test_no_character_but_a_line_feed_ends_a_line_of_json(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d"
    rows = [
        {"arrival_s": 0, "prompt_tokens": 8, "output_tokens": 1, "session": text},
        {"arrival_s": 1, "prompt_tokens": 9, "output_tokens": 1},
    ]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    trace = load_trace(write(tmp_path, "own.jsonl", lines))
    assert [r.session for r in trace.requests] == [text, None]
    prompts = json.dumps({"prompt": text, "output_tokens": 3}, ensure_ascii=False) + "\n"
    assert len(load_trace(write(tmp_path, "prompts.jsonl", prompts * 3))) == 3


DYNAMO = jsonl(
    {"timestamp": 679, "input_length": 250, "output_length": 5, "hash_ids": [0, 1, 2, 3]},
    {"timestamp": 1206, "input_length": 70, "output_length": 5, "hash_ids": [0, 9]},
)


def test_block_size_and_time_unit_are_the_user_s(tmp_path: Path) -> None:
    path = write(tmp_path, "dynamo.jsonl", DYNAMO)
    with pytest.raises(InputError) as caught:
        load_trace(path)
    for part in ("hash_ids=4: ", "512 tokens", "--trace-block-size", "64 would fit", " ms, "):
        assert part in str(caught.value)
    trace = load_trace(path, TraceOptions(64, "us"))
    same(trace, [(0.0, 250, 5, None, (0, 1, 2, 3)), (0.000527, 70, 5, None, (0, 9))])
    assert trace.prefix_block_tokens == 64
    assert "times in us, prefix blocks of 64 tokens" in trace.notes[0]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (AZURE + "2024-05-10 00:00:00,3,4\n", TraceOptions(time_unit="s"), "--trace-time-unit"),
        ("num_prefill_tokens,num_decode_tokens\n3,4", TraceOptions(time_unit="s"), "time-unit"),
        (BURST + "5,X,472,18,490,API\n", TraceOptions(block_tokens=16), "--trace-block-size"),
        (OWN + "}\n", TraceOptions(block_tokens=16), "--trace-block-size"),
        (BURST + "5,X,472,18,490,API\n", TraceOptions(tokenizer=Path(__file__)), "be read"),
        (jsonl({"prompt": "a", "output_tokens": 1}), TraceOptions(tokenizer=Path("absent")),
         "--trace-tokenizer absent: no such file"),
    ],
)  # fmt: skip
def test_options_that_say_nothing_are_refused(
    tmp_path: Path, text: str, options: TraceOptions, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_trace(write(tmp_path, "x", text), options)


def test_texts_are_counted_by_a_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"red": 0, "fox": 1, "?": 2}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = write(tmp_path, "x.jsonl", jsonl({"prompt": "a red red fox", "output_tokens": 1}))
    for where in (tmp_path, tmp_path / "tokenizer.json"):
        trace = load_trace(path, TraceOptions(tokenizer=where))
        assert [r.prompt_tokens for r in trace.requests] == [4]
        assert "estimated" not in trace.notes[0]
    for text in (BURST + "5,X,472,18,490,API\n", OWN + "}\n"):
        with pytest.raises(InputError, match="holds lengths, no texts"):
            load_trace(write(tmp_path, "b", text), TraceOptions(tokenizer=tmp_path))


LENGTHS = "num_prefill_tokens,num_decode_tokens,"
BAD = [
    ("burst.csv", BURST + "5,X,472,18,490,API\n6,X,many,18,490,API\n", ":3: Request tokens='many'"),
    ("burst.csv", BURST + "-5,X,472,18,490,API\n", ":2: Timestamp='-5'"),
    ("burst.csv", BURST + "nan,X,472,18,490,API\n", ":2: Timestamp='nan'"),
    ("burst.csv", BURST + "1,X,4.5,18,490,API\n", ":2: Request tokens='4.5'"),
    ("burst.csv", BURST + "1,X,,18,490,API\n", ":2: Request tokens=''"),
    ("burst.csv", BURST + "1,X,4,18,490,API,more\n", ":2: row="),
    ("azure.csv", AZURE + "yesterday,374,44\n", ":2: TIMESTAMP='yesterday'"),
    ("azure.csv", AZURE + "2024-02-30 00:00:00+00:00,374,44\n", ":2: TIMESTAMP='2024-02-30"),
    ("azure.csv", AZURE + "2023-11-16 18:15:46.68,374,0\n", "no usable request"),
    ("azure.csv", AZURE + "2023-11-16 18:15:46.68,374\n", ":2: GeneratedTokens=None"),
    ("moon.jsonl", MOON + "[0, 1, 2]}\n", ":1: hash_ids=3"),
    ("moon.jsonl", MOON + "[0, true]}\n", ":1: hash_ids=True"),
    ("moon.jsonl", MOON + "[0]}\n" + MOON + "[0\n", ":2: not JSON"),
    ("moon.jsonl", MOON + "[0]}\n" + '{"input_length": 1, "output_length": 1, "delay": 5}',
     ":2: timestamp=None"),
    ("own.jsonl", OWN + "}\n[1]\n", ":2: row="),
    ("own.jsonl", OWN + ', "sesion": "a"}\n', "did you mean 'session'"),
    ("own.jsonl", OWN + ', "prefix_blocks": [1, 2, 3]}\n', ":1: prefix_blocks=3"),
    ("own.jsonl", '{"arrival_s": 1, "prompt_tokens": 0, "output_tokens": 2}\n', "prompt_tokens=0"),
    ("lengths.json", '{"data": [{"input_length": 3, "output_length": ""}]}', ":1: output_length"),
    ("lengths.json", '{"data": []}', "no request in it"),
    ("lengths.json", '{"rows": []}', ":1: unknown trace format with fields 'rows'"),
    ("what.csv", "a,b\n1,2\n", "fields 'a, b'; formats that are read (docs/traces.md): Gimbal, Az"),
    ("empty.csv", AZURE, "no usable request"),
    ("empty.jsonl", "\n \n", "no request in it"),
    # a field that seems to hold arrivals
    ("when.csv", LENGTHS + "arrival\n8,9,0.5\n", ":2: arrival='0.5': expected no times beside"),
    ("when.csv", LENGTHS + "sentAt\n8,9,0.5\n", ":2: sentAt='0.5': expected no times"),
    ("when.csv", LENGTHS + "REQUEST_TIMESTAMP\n8,9,1\n", ":2: REQUEST_TIMESTAMP='1': expected no"),
    ("when.jsonl", jsonl({"prompt_tokens": 3, "output_tokens": 4, "created_time": 7}), "created_t"),
    ("when.jsonl", jsonl({"input_length": 3, "output_length": 4}) + MOON + "[]}\n",
     ":2: timestamp=3000: expected no times"),
    # inside records
    ("b.jsonl", BATCH + '{"max_tokens": 3, "messages": [{"content": [{"type": "image_url"}]}]}}\n',
     ":1: content='image_url': expected parts of type 'text' alone"),
    ("b.jsonl", BATCH + '{"messages": []}}\n', ":1: max_tokens=None"),
    ("b.jsonl", BATCH + '{"max_tokens": 3, "prompt": ["a", "b"]}}\n', ":1: prompt=['a', 'b']"),
    ("b.jsonl", BATCH + "7}\n", ":1: body=7: expected a JSON object"),
    ("v.json", '{"input_lens": [3], "output_lens": [4, 5]}', ":2: input_lens=None"),
    ("v.json", '{"input_lens": 3, "output_lens": [4]}', ":1: input_lens=3: expected a list"),
    ("g.json", '{"benchmarks": [{"requests": {}}]}', ":1: requests.successful=None"),
    ("s.json", '[{"id": 1, "conversations": [3, 4]}]', ":1: row=3: expected a JSON object"),
    # what is not read
    ("v.json", '{"total_input_tokens": 3, "total_output_tokens": 4}', "--save-detailed"),
    ("a.json", '{"request_throughput": {"avg": 1}, "input_sequence_length": {"avg": 3}}',
     "profile_export.jsonl beside it has the requests; formats that are read"),
    ("p.jsonl", jsonl({"prompt": "hello"}), "prompts without the length of an answer"),
    ("w.json", '{"id": "x", "requests": [{"t": 0, "in": 5, "out": 6}]}', "WEKA"),
    ("chunk-0-trace.csv", "0,1.33,8.6,Weibull,0.38,0.4\n600,0,0,,0,0\n", "ServeGen client"),
    ("chunk-0-dataset.json", '{\n"0": {"input_tokens": "{3: 1.0}"}\n}', "ServeGen client"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_row_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(InputError) as caught:
        load_trace(path)
    assert str(caught.value).startswith(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("start", "name"), BINARY.items(), ids=BINARY.values())
def test_binary_files_are_named(tmp_path: Path, start: bytes, name: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(start + bytes(range(256)))
    with pytest.raises(InputError, match=f"cannot be read: {name}; convert it to CSV"):
        load_trace(str(path))


def test_a_batch_is_as_long_as_it_may_get(tmp_path: Path) -> None:
    body = chat("max_tokens", 5, TEXT) | {"max_completion_tokens": 9}
    path = write(tmp_path, "b.jsonl", jsonl({"custom_id": "1", "body": body}))
    assert [r.output_tokens for r in load_trace(path).requests] == [9]


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
