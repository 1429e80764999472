"""Talk to a running server with the official OpenAI client.

    python examples/chat.py                        # chat, streamed
    python examples/chat.py --completion --prompt "once upon"
    python examples/chat.py --abort-after 5        # close the stream in the middle

The demo model has random weights: its words are real tokens, not sense.
"""

from __future__ import annotations

import argparse
import time

import openai


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="base URL")
    parser.add_argument("--model", help="model name (default: the first one served)")
    parser.add_argument("--prompt", default="Hello! Who are you?", help="what to say")
    parser.add_argument("--max-tokens", type=int, default=64, help="length of the answer")
    parser.add_argument("--completion", action="store_true", help="/completions, not /chat")
    parser.add_argument(
        "--abort-after", type=int, metavar="N", help="hang up after N pieces of the answer"
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    client = openai.OpenAI(base_url=options.url, api_key="none")
    model = options.model or client.models.list().data[0].id
    shared = {
        "model": model,
        "max_tokens": options.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start_s = time.perf_counter()
    if options.completion:
        stream = client.completions.create(prompt=options.prompt, **shared)
    else:
        message = {"role": "user", "content": options.prompt}
        stream = client.chat.completions.create(messages=[message], **shared)
    first_s, usage, pieces = None, None, 0
    for chunk in stream:
        usage = chunk.usage or usage
        if not chunk.choices:
            continue
        choice = chunk.choices[0]
        text = choice.text if options.completion else choice.delta.content
        if not text:
            continue
        first_s = first_s or time.perf_counter() - start_s
        print(text, end="", flush=True)
        pieces += 1
        if pieces == options.abort_after:
            stream.close()
            print(f"\n[hung up after {pieces} pieces]")
            return
    print()
    took_s = time.perf_counter() - start_s
    print(
        f"[{model}: {usage.prompt_tokens} prompt + {usage.completion_tokens} output tokens, "
        f"first after {(first_s or took_s) * 1e3:.0f} ms, all after {took_s * 1e3:.0f} ms]"
    )


if __name__ == "__main__":
    main()
