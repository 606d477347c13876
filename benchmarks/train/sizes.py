"""How much is measured: `paper` on a GPU, `small` on a CPU, `tiny` for the tests and a look.

With teachers in the loop an image costs a CPU 1.75 TFLOP, so these arms have fewer rounds there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PLAIN, TOKENS, CACHED = "no tokens, no losses", "no distillation", "cached targets"
ONLINE, ONE = "online, batched", "online, one image at a time"
ARMS = (PLAIN, TOKENS, CACHED, ONLINE, ONE)


@dataclass(frozen=True)
class Llm:
    """Shape of a Llama."""

    title: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    """Whether input and output embeddings are one."""
    rope_theta: float = 10_000.0


@dataclass(frozen=True)
class Encoder:
    """Shape of a CLIP vision tower with patches of 14 pixels."""

    title: str
    image: int
    hidden: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Size:
    recipe: str
    """A shipped one."""
    llm: Llm
    encoder: Encoder
    teachers: dict[str, str]
    """For each task an architecture of `benchmarks.extract`."""
    compute_dtype: str
    """Of the teachers."""
    batch: int
    images: int
    """Distinct ones, and rows of the store."""
    shard_rows: int
    rounds: int
    online_rounds: int
    """Of the arms with teachers in the loop."""
    steps: int
    """A round; its time is divided by them."""
    part_steps: int
    """Of each arm, in which its parts are timed."""
    train_steps: int
    """Of a run of the trainer, the first two of which are not kept."""
    workers: int
    """Loader processes of an arm."""
    memory_arms: tuple[str, ...] = ARMS
    """Those whose memory is measured: each is a process of its own."""
    checkpointing: tuple[bool, ...] = (False,)
    """Gradient checkpointing: each value is measured."""
    overrides: dict[str, object] = field(default_factory=dict)
    """Of the recipe."""
    needs_gpu: bool = False


_CLIP_L = Encoder("CLIP-L/336", 336, 1024, 24, 16)
_LARGE = {"gen": "gen-large", "depth": "depth-large", "seg": "seg-large"}
_FLOAT32 = {"model.dtype": "float32", "train.mixed_precision": "no"}

SIZES = {
    "paper": Size(
        recipe="llama3-8b-clip-l",
        llm=Llm("Llama-3-8B", 4096, 32, 32, 8, 14336, 128_256, tied=False, rope_theta=500_000.0),
        encoder=_CLIP_L,
        teachers=_LARGE,
        compute_dtype="bfloat16",
        batch=16,
        images=256,
        shard_rows=64,
        rounds=5,
        online_rounds=5,
        steps=4,
        part_steps=3,
        train_steps=30,
        workers=4,
        checkpointing=(True, False),
        needs_gpu=True,
    ),
    "small": Size(
        recipe="llama3-8b-clip-l",
        llm=Llm("SmolLM2-135M", 576, 30, 9, 3, 1536, 49_152, tied=True, rope_theta=100_000.0),
        encoder=_CLIP_L,
        teachers=_LARGE,
        compute_dtype="float32",
        batch=2,
        images=16,
        shard_rows=8,
        rounds=3,
        online_rounds=1,
        steps=1,
        part_steps=1,
        train_steps=5,
        workers=1,
        memory_arms=(TOKENS, CACHED, ONLINE),
        overrides=_FLOAT32,
    ),
    "tiny": Size(
        recipe="tiny",
        llm=Llm("a tiny Llama", 64, 8, 4, 2, 128, 1100, tied=False),
        encoder=Encoder("a tiny CLIP", 56, 64, 4, 4),
        teachers={"gen": "gen-tiny", "depth": "depth-tiny", "seg": "seg-tiny"},
        compute_dtype="float32",
        batch=2,
        images=4,
        shard_rows=2,
        rounds=1,
        online_rounds=1,
        steps=1,
        part_steps=1,
        train_steps=4,
        workers=1,
        memory_arms=(CACHED,),
    ),
}
