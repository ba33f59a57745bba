"""Models from and for Hugging Face `transformers`: folders of safetensors in Llama format.

A folder holds `config.json` and either `model.safetensors` or shards that `model.safetensors.index.json` lists; an
export adds `tokenizer.json` and `tokenizer_config.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.config import ModelConfig
from workers.model.errors import ModelError
from workers.model.shape import DecoderShape, parameter_shapes, resolve_shape
from workers.tensor_file import save_tensors

if TYPE_CHECKING:
    from workers.model.llama import Llama

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class ExportTokenizer(Protocol):
    """What an export needs of a tokenizer (those of `workers.data.tokenizers` have it)."""

    @property
    def separator_id(self) -> int:
        """The token that ends a document."""

    def to_json(self) -> str:
        """Return the text of its `tokenizer.json`."""


# Reading ---------------------------------------------------------------------------------------------------------


def load_hf_tensors(directory: Path, model: Llama) -> None:
    """Copy the weights of a Llama folder into `model`, whatever float type they have.

    Everything is checked before the first value is copied. Raises ModelError that names the setting, tensor or file
    that does not fit: another architecture or size, another vocabulary, a missing, superfluous or misshapen tensor.
    """
    files, sources = check_hf_folder(directory, model.shape)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for file in sorted(set(files.values())):
            with safe_open(directory / file, framework="pt") as tensors:
                for name, source in sources.items():
                    if files[source] == file:
                        parameters[name].copy_(tensors.get_tensor(source))


def check_hf_folder(directory: Path, shape: DecoderShape) -> tuple[dict[str, str], dict[str, str]]:
    """Check everything about a Llama folder but the values of its tensors; raises as `load_hf_tensors`.

    Returns the file that holds each tensor, and the tensor that each parameter of the model comes from.
    """
    settings = _read_json(directory / CONFIG_FILE, directory)
    _check_architecture(settings, shape, directory)
    files = _weight_files(directory)
    sources = _sources(parameter_shapes(shape), set(files), tied=bool(settings.get("tie_word_embeddings", False)))
    _check_tensors(directory, files, sources, shape)
    return files, sources


def _read_json(path: Path, directory: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model.init_from = {str(directory)!r}: looked for {path.name} and did not find it; "
            f"expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE} or {INDEX_FILE}"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"model.init_from: {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"model.init_from: {path} holds a {type(content).__name__}, expected an object")
    return content


def _check_architecture(settings: Mapping[str, Any], shape: DecoderShape, directory: Path) -> None:
    """Compare config.json with `[model]`: several of its settings change the function but no tensor's shape."""
    place = f"model.init_from = {str(directory)!r}"
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    unsupported = {
        "model_type": (settings.get("model_type"), "llama"),
        "hidden_act": (settings.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(settings.get("attention_bias", False)), False),
        "mlp_bias": (bool(settings.get("mlp_bias", False)), False),
        "rope_type": (kind, "default"),
        "quantization_config": (settings.get("quantization_config"), None),
    }
    for key, (found, supported) in unsupported.items():
        if found != supported:
            raise ModelError(f"{place}: {CONFIG_FILE} says {key} = {found!r}; the built-in decoder is {supported!r}")
    heads = settings.get("num_attention_heads", shape.heads)
    theirs = {
        "layers": (settings.get("num_hidden_layers"), shape.layers),
        "dim": (settings.get("hidden_size"), shape.dim),
        "heads": (heads, shape.heads),
        "kv_heads": (settings.get("num_key_value_heads") or heads, shape.kv_heads),
        "hidden": (settings.get("intermediate_size"), shape.hidden),
        "rope_theta": (float(rope.get("rope_theta", settings.get("rope_theta", 10_000.0))), shape.rope_theta),
        "norm_eps": (settings.get("rms_norm_eps", 1e-6), shape.norm_eps),
    }
    wrong = {key: pair for key, pair in theirs.items() if pair[0] != pair[1]}
    if wrong:
        raise ModelError(
            f"{place}: the checkpoint differs from [model] in "
            + ", ".join(f"{key} ({found} against {ours})" for key, (found, ours) in wrong.items())
            + "; set in [model]: "
            + ", ".join(f"{key} = {found}" for key, (found, _) in theirs.items())
        )
    head_dim = settings.get("head_dim") or shape.head_dim
    if head_dim != shape.head_dim:
        raise ModelError(
            f"{place}: {CONFIG_FILE} says head_dim = {head_dim}; the built-in decoder has {shape.head_dim}"
        )


def _weight_files(directory: Path) -> dict[str, str]:
    """Name of the file that holds each tensor."""
    if (directory / INDEX_FILE).is_file():
        listed = _read_json(directory / INDEX_FILE, directory).get("weight_map")
        if not isinstance(listed, dict):
            raise ModelError(f"model.init_from: {directory / INDEX_FILE} has no 'weight_map'")
        expected = {str(name): str(file) for name, file in listed.items()}
    elif (directory / WEIGHTS_FILE).is_file():
        expected = {}
    else:
        raise ModelError(
            f"model.init_from = {str(directory)!r}: looked for {WEIGHTS_FILE} and {INDEX_FILE} and found neither; "
            "only safetensors are read"
        )
    found: dict[str, str] = {}
    for file in sorted(set(expected.values())) or [WEIGHTS_FILE]:
        found |= dict.fromkeys(_tensor_shapes(directory / file), file)
    for name, file in expected.items():
        if found.get(name) != file:
            raise ModelError(f"model.init_from: {INDEX_FILE} says that {file} holds {name!r}, but it does not")
    return found


def _tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model.init_from: {path} cannot be read as safetensors: {error}") from error


def _sources(wanted: Mapping[str, tuple[int, ...]], available: set[str], *, tied: bool) -> dict[str, str]:
    """Tensor of the checkpoint that each parameter comes from: its namesake, or the embedding for a tied head."""
    sources = {name: name for name in wanted}
    if HEAD in wanted and HEAD not in available and tied:
        sources[HEAD] = EMBEDDING  # the same function; the two matrices part in training
    return sources


def _check_tensors(directory: Path, files: Mapping[str, str], sources: Mapping[str, str], shape: DecoderShape) -> None:
    place = f"model.init_from = {str(directory)!r}"
    missing = [source for source in sources.values() if source not in files]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{place}: the tensor {missing[0]!r}{more} is missing from {', '.join(sorted(set(files.values())))}"
        )
    found = {name: size for file in set(files.values()) for name, size in _tensor_shapes(directory / file).items()}
    rows = found[EMBEDDING][0] if found[EMBEDDING] else 0
    if rows != shape.vocab_size:
        raise ModelError(
            f"{place}: the checkpoint has a vocabulary of {rows} tokens, the data pack one of {shape.vocab_size}; "
            "pack the data with the checkpoint's own tokenizer (atoll data pack --tokenizer DIR/tokenizer.json)"
        )
    wanted = parameter_shapes(shape)
    for name, source in sources.items():
        if found[source] != wanted[name]:
            raise ModelError(
                f"{place}: the tensor {source!r} has shape {found[source]}, the model needs {wanted[name]}"
            )
    if shape.tie_embeddings and HEAD in files and not _same_values(directory, files):
        raise ModelError(
            f"{place}: the checkpoint has an output head {HEAD!r} of its own; set model.tie_embeddings = false"
        )
    ignored = {HEAD} if shape.tie_embeddings else set()
    extra = sorted(name for name in files.keys() - wanted.keys() - ignored if not name.endswith("rotary_emb.inv_freq"))
    if extra:
        raise ModelError(
            f"{place}: the checkpoint has the tensor {extra[0]!r}, which the built-in decoder does not have"
        )


def _same_values(directory: Path, files: Mapping[str, str]) -> bool:
    with safe_open(directory / files[HEAD], "pt") as heads, safe_open(directory / files[EMBEDDING], "pt") as embeddings:
        return torch.equal(heads.get_tensor(HEAD), embeddings.get_tensor(EMBEDDING))


# Writing ---------------------------------------------------------------------------------------------------------


def export_hf(
    directory: Path, config: ModelConfig, tensors: Mapping[str, Tensor], tokenizer: ExportTokenizer, *, seq_len: int
) -> None:
    """Write `tensors` (parameters by name) so that AutoModelForCausalLM and AutoTokenizer load the folder.

    `seq_len` becomes the context length that the folder states. The folder is made; files of the same names in it are
    replaced. Raises ModelError for a factory model and for tensors that are not those of `config`.
    """
    if config.factory is not None:
        raise ModelError(
            f"export writes the built-in decoder; this run's model comes from model.factory = {config.factory!r}: "
            "load the run's snapshot and save it with your own code"
        )
    if EMBEDDING not in tensors:
        raise ModelError(f"export: the tensor {EMBEDDING!r} is missing")
    shape = resolve_shape(config, vocab_size=tensors[EMBEDDING].shape[0], seq_len=seq_len)
    wanted = parameter_shapes(shape)
    for name in wanted.keys() ^ tensors.keys():
        raise ModelError(f"export: the tensor {name!r} is {'missing' if name in wanted else 'not one of the model'}")
    for name, size in wanted.items():
        if tuple(tensors[name].shape) != size:
            raise ModelError(f"export: {name!r} has shape {tuple(tensors[name].shape)}, [model] says {size}")
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / CONFIG_FILE, _llama_settings(shape, tokenizer.separator_id))
    _write_json(directory / "tokenizer_config.json", _tokenizer_settings(tokenizer, seq_len))
    (directory / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    plain = {name: tensors[name].detach().to("cpu", torch.float32).contiguous() for name in wanted}
    save_tensors(directory / WEIGHTS_FILE, plain, metadata={"format": "pt"})


def export_layers(
    directory: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: ExportTokenizer,
    *,
    seq_len: int,
) -> None:
    """Write a model that is a list of layers of the user's: safetensors by parameter, tokenizer, and what builds it.

    No library knows its architecture: `config.json` names `model.factory` and its options, and `load_state_dict` takes
    the tensors into `nn.Sequential` under the name `layers`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    told = {"factory": config.factory, "options": dict(config.options), "max_position_embeddings": seq_len}
    _write_json(directory / CONFIG_FILE, {"model_type": "atoll-layers", **told})
    _write_json(directory / "tokenizer_config.json", _tokenizer_settings(tokenizer, seq_len))
    (directory / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    plain = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    save_tensors(directory / WEIGHTS_FILE, plain, metadata={"format": "pt"})


def _llama_settings(shape: DecoderShape, separator_id: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.dim,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.seq_len,
        "rms_norm_eps": shape.norm_eps,
        # transformers 4 reads the first two, transformers 5 the third.
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tie_embeddings,
        "initializer_range": shape.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "bos_token_id": separator_id,
        "eos_token_id": separator_id,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def _tokenizer_settings(tokenizer: ExportTokenizer, seq_len: int) -> dict[str, Any]:
    separator = token_text(tokenizer.to_json(), tokenizer.separator_id)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": separator,
        "eos_token": separator,
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_len,
        # Atoll's tokenizers take a special token that is written in a text for plain text.
        "split_special_tokens": True,
    }


def token_text(tokenizer_json: str, token_id: int) -> str:
    """Text of one token of a `tokenizer.json`; raises ModelError where it has no such id."""
    document = json.loads(tokenizer_json)
    for token in document.get("added_tokens") or ():
        if token["id"] == token_id:
            return str(token["content"])
    vocab = document["model"].get("vocab", {})
    entries = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    for text, entry_id in entries:
        if entry_id == token_id:
            return str(text)
    raise ModelError(f"export: the tokenizer has no token {token_id}")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
