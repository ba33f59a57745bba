"""Against the real `transformers` (the only module that imports it: that takes seconds)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from workers.config import ModelConfig
from workers.data.tokenizers import ByteTokenizer, JsonTokenizer
from workers.model.factory import build_model
from workers.model.hf import export_hf

transformers = pytest.importorskip("transformers", reason="needs the 'test' extra")

TEXT = "Grüße, <|endoftext|> 中文\n\n\tdef f(x):\x00 return 1  "


def exported(directory: Path, tokenizer: Any, **settings: object) -> tuple[torch.nn.Module, torch.Tensor]:
    # Large weights, so that a wrong rotation, norm or head order cannot hide in small logits.
    config = ModelConfig(layers=2, dim=48, heads=4, hidden=80, init_std=0.3, norm_eps=1e-3, rope_theta=500.0)
    config = config.model_copy(update=settings)
    bundle = build_model(config, vocab_size=tokenizer.vocab_size, seq_len=24, seed=5)
    with torch.no_grad():
        for name, parameter in bundle.model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    export_hf(directory, config, dict(bundle.model.named_parameters()), tokenizer, seq_len=24)
    tokens = torch.randint(0, tokenizer.vocab_size, (3, 24), generator=torch.Generator().manual_seed(0))
    return bundle.model, tokens


@pytest.mark.parametrize("settings", [{"tie_embeddings": True}, {"tie_embeddings": False, "kv_heads": 2}])
def test_transformers_gives_the_same_logits_and_gradients(tmp_path: Path, settings: dict[str, object]) -> None:
    model, tokens = exported(tmp_path, ByteTokenizer(), **settings)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, reference = model(tokens), theirs(tokens).logits
    assert reference.std() > 1
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
    ours.square().mean().backward()
    reference.square().mean().backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, their_gradients[name], rtol=1e-3, atol=1e-4, msg=name)


def test_transformers_starts_where_our_model_starts_and_back(tmp_path: Path) -> None:
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=24, rms_norm_eps=1e-5, tie_word_embeddings=False,
        )
    )  # fmt: skip
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config = ModelConfig(
        layers=3, dim=48, heads=4, kv_heads=2, hidden=80, tie_embeddings=False, init_from=str(tmp_path)
    )
    model = build_model(config, vocab_size=256, seq_len=24, seed=0).model
    tokens = torch.arange(48).view(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)


def test_the_byte_tokenizer_is_the_same_in_transformers(tmp_path: Path) -> None:
    ours = ByteTokenizer()
    exported(tmp_path, ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT)
    assert theirs.decode(ours.encode(TEXT)) == TEXT
    assert len(theirs) == ours.vocab_size and theirs.eos_token_id == ours.separator_id
    every = "".join(map(chr, [*range(0x800), 0xD7FF, 0xE000, 0xFFFD, 0x10FFFF]))
    assert theirs(every)["input_ids"] == ours.encode(every)


def test_a_trained_tokenizer_is_the_same_in_transformers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator([TEXT * 20], trainer)
    ours = JsonTokenizer(library.to_str(), place="test")
    model, tokens = exported(tmp_path, ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT)
    assert theirs.eos_token_id == ours.separator_id
    with torch.no_grad():
        reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
        torch.testing.assert_close(model(tokens), reference, rtol=1e-4, atol=1e-4)


def test_transformers_continues_as_our_greedy_sampling(tmp_path: Path) -> None:
    from workers.model.sample import generate

    tokenizer = ByteTokenizer()
    model, _ = exported(tmp_path, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor([tokenizer.encode("def ")])
    ids = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False, pad_token_id=0
    )
    assert generate(model, tokenizer, "def ", 16, 0.0, 0) == tokenizer.decode(ids[0].tolist())
