"""Writes the demo model: a tiny Qwen3-MoE in Hugging Face format, deterministic from its seed.

Its routing looks like that of real models (DeepSeek-V2-Lite on the four tasks of ESFT: expert
max/mean per layer 3 to 5, Jensen-Shannon divergence between tasks 0.10 to 0.20 bits) because word
embeddings lie in one cluster per domain, gate rows are aligned with the clusters on top of a
popularity per expert, and every layer keeps the part of the residual stream the gates read.
`weights` has the construction and `calibrate` the search for its strengths; ``gimbal model
stats`` measures the result by running the model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gimbal.core.errors import InputError
from gimbal.core.files import writing
from gimbal.demo.manifest import MANIFEST, manifest_values
from gimbal.demo.sizes import BYTE_TOKENS, FIRST_WORD_ID, HEAD_DIM, SPECIAL_TOKENS, DemoSizes
from gimbal.demo.vocabulary import DemoVocabulary, build_vocabulary
from gimbal.demo.weights import tensors

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_demo_model(
    out: Path,
    sizes: DemoSizes | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Writes the model into `out` (made if need be) and returns it; interrupted, it leaves nothing.

    Args:
        on_layer: called with (finished, all) layers.

    Raises:
        InputError: a size vLLM cannot take, a missing library, `out` holding something else or
            that cannot be written.
    """
    sizes = sizes or DemoSizes()
    sizes.check()
    _require_libraries()
    require_free(out)
    whole = out.absolute()
    near = next(folder for folder in (whole, *whole.parents) if folder.exists())
    with writing(out), tempfile.TemporaryDirectory(dir=near, prefix=f".{out.name}-") as scratch:
        _write(Path(scratch), sizes, on_layer)
        out.mkdir(parents=True, exist_ok=True)
        for file in sorted(Path(scratch).iterdir(), key=lambda file: file.name == MANIFEST):
            file.replace(out / file.name)  # the manifest last: it says that the model is whole
    return out


def require_free(out: Path) -> None:
    """Raises InputError when `out` holds something that is no demo model."""
    with writing(out):
        if out.exists() and (
            not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).exists())
        ):
            raise InputError(f"{out}: exists and is not a demo model; choose another folder")


def _write(out: Path, sizes: DemoSizes, on_layer: Callable[[int, int], None]) -> None:
    rng = np.random.Generator(np.random.PCG64(sizes.seed))
    words = build_vocabulary(sizes, rng)
    _write_tokenizer(out, sizes, words)
    _write_json(out / "config.json", _config(sizes))
    _write_json(
        out / "generation_config.json",
        {"bos_token_id": None, "eos_token_id": _special("<|im_end|>"), "do_sample": False},
    )
    _save(out / "model.safetensors", tensors(sizes, words, rng, on_layer))
    _write_json(out / MANIFEST, manifest_values(sizes, words))


def _require_libraries() -> None:
    try:
        import safetensors
        import tokenizers
    except ImportError as error:
        raise InputError(
            f"the demo model needs {error.name}: pip install 'gimbal-moe[cpu]'"
        ) from None
    del safetensors, tokenizers


def _special(token: str) -> int:
    return BYTE_TOKENS + SPECIAL_TOKENS.index(token)


def _config(sizes: DemoSizes) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": 2 * sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": sizes.max_position,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "moe_intermediate_size": sizes.moe_intermediate,
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": _special("<|im_end|>"),
        "pad_token_id": _special("<|endoftext|>"),
    }


def _write_tokenizer(out: Path, sizes: DemoSizes, words: DemoVocabulary) -> None:
    """Byte-level: a known word is one token, anything else is spelt in bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab.update({token: BYTE_TOKENS + i for i, token in enumerate(SPECIAL_TOKENS)})
    # ByteLevel writes the space byte as U+0120.
    vocab.update({"Ġ" + w[1:]: FIRST_WORD_ID + i for i, w in enumerate(words.words)})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    (out / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": sizes.max_position,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
        },
    )


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of `values`, rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _save(path: Path, named: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes bfloat16 safetensors; numpy has no bfloat16, hence the raw bit patterns."""
    import safetensors

    arrays = {name: to_bfloat16(values) for name, values in named}
    spec = getattr(safetensors, "TensorSpec", None)
    if spec is not None:
        entries = {
            name: spec(dtype="bfloat16", shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes)
            for name, a in arrays.items()
        }
    else:  # safetensors before 0.8
        entries = {
            name: {"dtype": "bfloat16", "shape": list(a.shape), "data": a.tobytes()}
            for name, a in arrays.items()
        }
    safetensors.serialize_file(entries, str(path), metadata={"format": "pt"})
    path.chmod(0o644)  # the library makes it private


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
