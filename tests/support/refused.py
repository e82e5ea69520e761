"""Flags that are refused whatever the model, a row for each that the code checks."""

from dataclasses import dataclass, field
from typing import Any

from sglang.srt.server_args import ServerArgs


@dataclass(frozen=True)
class Refused:
    """A command line and the words that its refusal begins with.

    flags: MODEL in them stands for the model's path.
    flag: the ServerArgs field, where one flag alone is refused.
    model, plan: changes to those of ``models.py``. gpu: whether steps run on one.
    """

    words: str
    flags: str = ""
    flag: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    gpu: bool = False
    hip: str | None = None  # torch's version of AMD's libraries, where it is built with them
    release: str | None = None  # of SGLang, where it is not the one that is installed
    speculation: str | None = None  # the same, for what speculative decoding asks
    hicache: str | None = None  # the same, for HiCache


def of_flag(name: str, flags: str, words: str = "") -> Refused:
    """A field that is refused whatever the model; its flag comes first."""
    words = words or f"{flags.split()[0]}: expected"
    return Refused(words, flags, flag=name)


LATER = hasattr(ServerArgs, "attn_dp_size")
DP = "--attn-dp-size: expected" if LATER else "--enable-dp-attention: expected"
GRAPHS = "cuda_graph_backend_prefill"
FULL_GRAPHS = '--cuda-graph-config {"prefill":{"backend":"full"}}'
EAGLE = "--speculative-algorithm EAGLE --speculative-draft-model-path MODEL"
EAGLE3 = EAGLE.replace("EAGLE", "EAGLE3")
NGRAM = "--speculative-algorithm NGRAM --speculative-ngram-max-bfs-breadth 1"
HICACHE = "--enable-hierarchical-cache"
CHAIN = "--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4"
TREE = "--speculative-num-steps 3 --speculative-eagle-topk 4 --speculative-num-draft-tokens 8"
FLAGS = (
    of_flag(
        "speculative_adaptive",
        f"{EAGLE} --speculative-adaptive",
        words="--speculative-adaptive: expected",
    ),
    of_flag(
        "enable_multi_layer_eagle",
        f"{EAGLE} --enable-multi-layer-eagle",
        words="--enable-multi-layer-eagle: expected",
    ),
    of_flag("disaggregation_mode", "--disaggregation-mode decode"),
    of_flag("dllm_algorithm", "--dllm-algorithm LowConfidence"),
    of_flag("kv_cache_dtype", "--kv-cache-dtype nvfp4"),
    of_flag("quantization_param_path", "--quantization-param-path scales.json"),
    of_flag("dcp_size", "--dcp-size 2 --tp-size 4"),
    of_flag("attn_cp_size", "--attn-cp-size 2 --tp-size 4"),
    of_flag("enable_prefill_cp", "--enable-prefill-cp"),
    of_flag("enable_dp_attention", "--enable-dp-attention --dp-size 2 --tp-size 2", DP),
    of_flag("enable_two_batch_overlap", "--enable-two-batch-overlap"),
    of_flag("enable_single_batch_overlap", "--enable-single-batch-overlap"),
    of_flag("enable_pdmux", "--enable-pdmux"),
    of_flag("enable_torch_compile", "--enable-torch-compile"),
    of_flag("hicache_storage_backend", "--hicache-storage-backend file"),
    of_flag("enable_lmcache", "--enable-lmcache"),
    of_flag("enable_flexkv", "--enable-flexkv"),
    of_flag("radix_cache_backend", "--radix-cache-backend flexkv"),
    of_flag("enable_hisparse", "--enable-hisparse"),
    of_flag("enable_mis", "--enable-mis"),
    of_flag("enable_unified_memory", "--enable-unified-memory"),
    of_flag("enable_page_major_kv_layout", "--enable-page-major-kv-layout"),
    of_flag("prefill_only_disable_kv_cache", "--prefill-only-disable-kv-cache"),
    of_flag("use_ray", "--use-ray"),
    of_flag("attn_dp_size", "--attn-dp-size 2 --tp-size 2"),
    of_flag("enable_kv_cache_sharding", "--enable-kv-cache-sharding"),
    of_flag("enable_unified_cache_external_linker", "--enable-unified-cache-external-linker"),
    of_flag("enable_nvidia_megakernel", "--enable-nvidia-megakernel"),
    of_flag(GRAPHS, "--cuda-graph-backend-prefill full"),
    of_flag(GRAPHS, FULL_GRAPHS, words="--cuda-graph-backend-prefill: expected breakable"),
)
FLAGS += (
    of_flag("device", "--device xpu"),
    of_flag("device", "--device npu"),
    Refused(
        "--device: expected NVIDIA's cuda, or cpu, with the kascade backend, got rocm",
        "--device cuda",
        flag="device",
        hip="6.4",
    ),
)
