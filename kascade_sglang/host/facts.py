"""A server's arguments and its model, as what Kascade decides on."""

from dataclasses import dataclass

from kascade_sglang.plan.schema import ModelShape


@dataclass(frozen=True)
class RefusedFlag:
    """A command-line flag with a value that Kascade does not work with."""

    flag: str
    expected: str
    got: str
    remedy: str = "drop the flag, or serve with another --attention-backend"


@dataclass(frozen=True)
class ModelFacts:
    """What a model is.

    path: what ``--model-path`` says. options: the ``"kascade"`` key of its config.
    shape: of the whole model, all ranks. dtype: torch's name of it.
    windowed: layers whose queries see only the last ``window`` positions, their own included, as
        SGLang serves the model. window_pool: whether these have a KV pool of their own.
    sinks: whether layers have attention sinks.
    unsupported: why Kascade cannot serve it, empty where it can.
    """

    path: str
    options: object
    shape: ModelShape
    dtype: str
    context: int
    windowed: tuple[int, ...] = ()
    window: int = 0
    window_pool: bool = False
    sinks: bool = False
    unsupported: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServerFacts:
    """What a server was asked to be.

    refused_flags: flags whose values Kascade does not work with.
    gpu: whether steps run on one. capability: its compute capability, (0, 0) without one.
    deterministic: ``--enable-deterministic-inference``.
    kv_cache_dtype: ``fp8_e4m3``, ``fp8_e5m2``, or ``auto``: the model's.
    phases: those of ``prefill`` and ``decode`` that run on the kascade backend.
    prefill_backend: ``--prefill-attention-backend``, None where it is not given.
    tensor_ranks, stages: how many. stage_starts: first layer of every pipeline stage.
    captured_decode, eager_decode: the most requests of a captured decode step, and of an eager
        one if it may be larger; 0 where there is none, or where SGLang will choose.
    largest_prefill: the most new tokens of a prefill step.
    page_size: tokens of a page of the KV pool. chunk: tokens that a prompt is prefilled by; 0
        where it is prefilled whole.
    speculates_by: the algorithm of speculative decoding, None without.
    chain: tokens that a decode step computes for each request: one, or drafts to verify.
    hicache: whether prefixes that leave the KV pool are kept in host memory.
    """

    model: ModelFacts
    refused_flags: tuple[RefusedFlag, ...]
    gpu: bool
    capability: tuple[int, int]
    deterministic: bool
    kv_cache_dtype: str
    phases: frozenset[str]
    prefill_backend: str | None
    tensor_ranks: int
    stages: int
    stage_starts: tuple[int, ...]
    captured_decode: int
    eager_decode: int
    largest_prefill: int
    page_size: int
    chunk: int
    speculates_by: str | None = None
    chain: int = 1
    hicache: bool = False
