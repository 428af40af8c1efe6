"""Tiny random transformers models, and a byte-level tokenizer to go with them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 257  # 256 bytes and the end of the text
END = 256
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]


def llama(seed=0, dtype=torch.float64, **changes):
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "initializer_range": 0.4,
            "bos_token_id": None,
            "eos_token_id": END,
            **changes,
        }
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(dtype)


def gpt2(seed=0, dtype=torch.float64):
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=1024, initializer_range=0.4,
        bos_token_id=None, eos_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config).to(dtype)


def mistral(seed=0, dtype=torch.float64):
    """Its attention sees the last 16 tokens only."""
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, sliding_window=16, initializer_range=0.4,
        bos_token_id=None, eos_token_id=END,
    )  # fmt: skip
    torch.manual_seed(seed)
    return MistralForCausalLM(config).to(dtype)


def _small(config, model, seed, dtype, **changes):
    """Three layers of grouped-query attention with wide initial weights."""
    torch.manual_seed(seed)
    return model(
        config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
            initializer_range=0.4, bos_token_id=None, eos_token_id=END, pad_token_id=None, **changes,
        )
    ).to(dtype)  # fmt: skip


ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


def qwen3(seed=0, dtype=torch.float64):
    return _small(Qwen3Config, Qwen3ForCausalLM, seed, dtype)


def gemma2(seed=0, dtype=torch.float64):
    """Its attention caps its scores, so it is eager: its softmax is float32, whatever ``dtype``."""
    return _small(Gemma2Config, Gemma2ForCausalLM, seed, dtype, layer_types=ALTERNATING, sliding_window=8)


def gemma3(seed=0, dtype=torch.float64):
    """Layers 1 and 3 see the last 8 tokens only and have another rotary base than layer 2.

    Its embeddings are small and not tied, its attention is sharp: else a random model repeats itself.
    """
    model = _small(
        Gemma3TextConfig, Gemma3ForCausalLM, seed, dtype, layer_types=ALTERNATING, sliding_window=8,
        tie_word_embeddings=False,
    )  # fmt: skip
    model.model.embed_tokens.weight.data *= 0.05
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.data += 2
        layer.self_attn.k_norm.weight.data += 2
    return model


ARCHITECTURES = {
    "llama": llama,
    "gpt2": gpt2,
    "qwen3": qwen3,
    "mistral, sliding window": mistral,
    "gemma3, alternating": gemma3,
}


def perturbed(model, amount, seed=1):
    """A drafter that resembles ``model``: its weights with noise."""
    torch.manual_seed(seed)
    drafter = type(model)(model.config).to(model.dtype)
    weights = {k: v + amount * v.std() * torch.randn_like(v) for k, v in model.state_dict().items()}
    drafter.load_state_dict(weights)
    return drafter


def interrupted(update, layer):
    """A cache's ``update`` that Ctrl-C meets in a layer."""

    def stops(keys, values, index, *rest):
        if index == layer:
            raise KeyboardInterrupt
        return update(keys, values, index, *rest)

    return stops


def tokenizer(missing=0):
    """One token per byte; ``missing`` of them have another meaning, which makes another vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    renamed = {c: f"{c}*" if i < missing else c for i, c in enumerate(alphabet)}
    vocabulary = {renamed[c]: i for i, c in enumerate(alphabet)} | {"<end>": END}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>")


def save(folder: Path, model, tokens=None) -> Path:
    """A transformers folder."""
    model.save_pretrained(folder)
    (tokens or tokenizer()).save_pretrained(folder)
    return folder


def corpora(root, letters, size):
    """A folder for each domain, with one train and one held-out text of ``size`` of its letters."""
    for domain, alphabet in letters.items():
        for part in ("train", "heldout"):
            folder = root / domain / part
            folder.mkdir(parents=True)
            (folder / "1.txt").write_text("".join(np.random.default_rng(0).choice(list(alphabet), size)))
    return root
