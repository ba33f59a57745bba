"""Settings of the workers: training, data, model, evaluation (no torch here)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from strategies.config import Section

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")]

FunctionPath = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]


# What `train.loop` is in the run directory of a script: only the script itself can go on with such a run.
SCRIPT = "__main__:script"


class IslandOverrides(Section):
    """`[train.per_island.island-N]`: what one island does otherwise than the rest; unset = as in `[train]`."""

    batch_size: int | None = Field(None, ge=1, le=1 << 20, description="Samples in one inner step of this island.")
    accumulation: int | None = Field(None, ge=1, le=65536, description="Micro-batches of one inner step.")
    threads: int | None = Field(None, ge=1, le=4096, description="CPU threads of this island.")
    device: Device | None = Field(None, description="Device of this island.")
    pace_s: float | None = Field(
        None, ge=0, le=3600, description="Seconds that an inner step of this island takes at least."
    )


class TrainConfig(Section):
    """`[train]`: the inner loop of one island."""

    tokens: int = Field(
        10_000_000, ge=1, description="The run ends when this many tokens are committed (samples, with data.samples)."
    )
    batch_size: int = Field(8, ge=1, le=1 << 20, description="Samples in one inner step of an island.")
    fit_batch: bool = Field(
        False,
        description="Each island takes the largest power of two up to batch_size that its memory takes, as measured.",
    )
    memory_fraction: float = Field(0.85, gt=0, le=1, description="Share of an island's memory that fit_batch may fill.")
    accumulation: int = Field(
        1, ge=1, le=65536, description="Micro-batches of equal size that one inner step is cut into."
    )
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="Inner optimizer.")
    lr: float = Field(1e-3, gt=0, le=10, description="Peak learning rate of the inner optimizer.")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="Final learning rate over peak learning rate.")
    warmup: float = Field(0.05, ge=0, le=1, description="Share of progress in which the learning rate rises.")
    schedule: Literal["cosine", "constant", "linear"] = Field("cosine", description="Shape after the warm-up.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: first moment decay.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW: second moment decay.")
    eps: float = Field(1e-8, gt=0, le=1, description="AdamW: added to the denominator.")
    weight_decay: float = Field(0.1, ge=0, le=10, description="Decoupled weight decay of matrices.")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon: momentum of matrices.")
    muon_lr: float = Field(0.02, gt=0, le=10, description="Muon: peak learning rate of matrices.")
    grad_clip: float = Field(1.0, ge=0, description="Largest gradient norm; 0 switches clipping off.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 = autocast; refused where unsupported.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the model, the data order and everything random.")
    threads: int = Field(1, ge=1, le=4096, description="CPU threads of one island.")
    loop: FunctionPath | None = Field(
        None, description="'package.module:function' that trains with its own loop; called without arguments."
    )
    loop_digest: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{32}$",
        description="Digest of the loop's sources: written into the resolved config, and checked on every machine.",
    )
    device: Device = Field("auto", description="'auto', 'cpu', 'cuda' or 'cuda:N'.")
    pace_s: float = Field(
        0.0, ge=0, le=3600, description="Seconds that an inner step takes at least: slow islands on a quick machine."
    )
    per_island: dict[str, IslandOverrides] = Field(
        default_factory=dict, description="Batch size, accumulation, threads and device of single islands, by name."
    )

    def for_island(self, member: str) -> TrainConfig:
        """The settings of one island: `[train]` with what `[train.per_island.<member>]` says otherwise."""
        overrides = self.per_island.get(member)
        changed = {} if overrides is None else overrides.model_dump(exclude_none=True)
        return self.model_copy(update={**changed, "per_island": {}})


class OwnDataConfig(Section):
    """`[data.per_island.NAME]`: a pack that only one island has, and that never leaves its machine."""

    path: str = Field(
        min_length=1, description="Folder on that island's machine, made by `atoll data pack --scope island`."
    )
    tokens: int = Field(ge=1, le=1 << 62, description="Tokens of the run (of train.tokens) that come from it.")


class DataConfig(Section):
    """`[data]`: where the tokens come from."""

    corpus: Literal["stdlib"] | None = Field(None, description="The embedded corpus; needs no file.")
    path: str | None = Field(
        None,
        min_length=1,
        description="Folder made by `atoll data pack`, or a URI of one (pyarrow.fs); a machine without it gets the "
        "shards that it needs.",
    )
    samples: int | None = Field(
        None,
        ge=1,
        le=1 << 62,
        description="The loop (train.loop, or a script) brings a dataset of so many samples; each counts as one token.",
    )
    seq_len: int = Field(
        128, ge=2, le=1 << 20, description="Tokens in one training sample (embedded corpus; a pack has its own)."
    )
    digest: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{32,64}$",
        description="BLAKE3 digest of the pack: written into the resolved config, and checked where it is given.",
    )
    per_island: dict[str, OwnDataConfig] = Field(
        default_factory=dict, description="Packs that never leave one machine: `[data.per_island.island-0]`."
    )
    own_wait_s: float = Field(
        600.0,
        ge=0.0,
        description="Seconds for which the end of the run waits for an island of data.per_island that is away, once "
        "nothing else is left; then the rest of its tokens is dropped, which journal and summary say.",
    )

    def own_samples(self, seq_len: int) -> dict[str, int]:
        """How many samples of the run are of each island's own pack."""
        return {name: max(own.tokens // seq_len, 1) for name, own in sorted(self.per_island.items())}


class ModelConfig(Section):
    """`[model]`: the built-in decoder, or a factory of the user."""

    factory: FunctionPath | None = Field(
        None,
        description="'package.module:function' that builds another model.",
    )
    factory_digest: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{32}$",
        description="Digest of the factory's sources: written into the resolved config, and checked on every machine.",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Handed to the factory.")
    init_from: str | None = Field(
        None, min_length=1, description="Folder of safetensors in Llama format to start from."
    )
    layers: int = Field(2, ge=1, le=1024, description="Decoder layers.")
    dim: int = Field(128, ge=8, le=1 << 17, description="Width of the model.")
    heads: int = Field(4, ge=1, le=1024, description="Attention heads; divides dim.")
    kv_heads: int | None = Field(None, ge=1, le=1024, description="Key/value heads; divides heads; default heads.")
    hidden: int | None = Field(
        None, ge=8, le=1 << 20, description="Width of the feed-forward part; default 8/3 dim, rounded up to 32."
    )
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary position embedding.")
    norm_eps: float = Field(1e-5, gt=0, le=1, description="RMSNorm epsilon.")
    tie_embeddings: bool = Field(True, description="Input and output embeddings share one matrix.")
    init_std: float = Field(0.02, gt=0, le=1, description="Standard deviation of the initial weights.")


class EvalConfig(Section):
    """`[eval]`: validation of the anchor by one living member in rotation."""

    every: float = Field(0.1, gt=0, le=1, description="Share of progress between two evaluations.")
    windows: int = Field(64, ge=1, le=1 << 20, description="Fixed validation samples in one evaluation.")
    batch_size: int = Field(16, ge=1, le=1 << 16, description="Samples in one forward pass of an evaluation.")
