"""Tiny random models for tests: real Llama code and a real tokenizer, milliseconds to run."""

from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]


def tokenizer(template: str | None = TEMPLATE):
    """A tokenizer of printable ASCII characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: i for i, t in enumerate([*SPECIAL, "\n", *map(chr, range(32, 127))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", additional_special_tokens=SPECIAL[3:]
    )
    made.chat_template = template
    return made


def llama(folder: Path, seed: int = 0, template: str | None = TEMPLATE, **config) -> Path:
    """A random Llama with its tokenizer in `folder`; its answers are gibberish that ends at once or never."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    words = tokenizer(template)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
    }
    ids = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id, "bos_token_id": None}
    # Wide weights make its distribution far from uniform, so that a wrong number cannot hide.
    model = LlamaForCausalLM(LlamaConfig(**{**shape, "vocab_size": len(words), "initializer_range": 0.2, **ids, **config}))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
