"""A model created in seconds: two layers of Qwen3 with random weights and a byte-level tokenizer of 512 tokens.

It answers nonsense, deterministically, through the same code as any model: for tests and for trying out the server.
"""

import json
import shutil
from pathlib import Path
from tempfile import mkdtemp

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
VOCABULARY = 512
MAX_TOKENS = 2048


def ensure(path: Path) -> Path:
    """Creates the model in `path`, atomically, unless it exists. Returns `path`."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(mkdtemp(prefix=f"{path.name}-", dir=path.parent))
    try:
        _make(new)
        new.chmod(0o755)
        try:
            new.rename(path)
        except OSError:
            # Several workers of a host that start together all make it: the first one's stays.
            if not path.exists():
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return path


def _make(path: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    text = "the quick brown fox and some other words that are often used in English sentences, one after another. "
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text * 3], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(path)

    torch.manual_seed(0)
    end = wrapped.convert_tokens_to_ids("<|end|>")
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=True,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    model.to(torch.bfloat16).save_pretrained(path)
    # Without sampling defaults: requests specify their own.
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
