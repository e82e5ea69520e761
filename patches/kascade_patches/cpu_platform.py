"""Entry point ``sglang.srt.platforms``: run SGLang on a machine without an accelerator.

Why: the released wheel's CPU path needs a CPU build of sgl_kernel; a demo and tests should not.
How: an out-of-tree platform that picks SGLang's own torch implementations.
Remove when: the stock wheel starts on a CPU.
"""

import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.interface import PlatformEnum, SRTPlatform


def activate() -> str | None:
    """Return our platform's class where nothing else can run, None elsewhere."""
    if torch.accelerator.is_available() or os.getenv("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    return f"{__name__}.TorchCpuPlatform"


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Plain torch on the host's processor."""

    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_device(self, local_rank: int = 0) -> str:
        # The mixin returns a torch.device; ServerArgs asks for its default device as text.
        return "cpu"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        return _torch_paged_allocator()


def _torch_paged_allocator() -> type:
    """Build SGLang's paged allocator with its two Triton kernels replaced by torch."""
    from sglang.srt.mem_cache.allocator.paged import (
        PagedTokenToKVPoolAllocator,
        alloc_extend_naive,
    )

    class TorchPagedAllocator(PagedTokenToKVPoolAllocator):
        """Same contract as the base class; runs anywhere."""

        def alloc_extend(
            self,
            prefix_lens: torch.Tensor,
            prefix_lens_cpu: torch.Tensor,
            seq_lens: torch.Tensor,
            seq_lens_cpu: torch.Tensor,
            last_loc: torch.Tensor,
            extend_num_tokens: int,
            num_new_pages: int | None = None,
        ) -> torch.Tensor | None:
            pages = -(-seq_lens_cpu // self.page_size) - -(-prefix_lens_cpu // self.page_size)
            needed = int(pages.sum())
            if self.need_sort and needed > len(self.free_pages):
                self.merge_and_sort_free()
            if needed > len(self.free_pages):
                return None
            slots = torch.empty(extend_num_tokens, dtype=torch.int64, device=self.device)
            alloc_extend_naive(
                prefix_lens, seq_lens, last_loc, self.free_pages, slots, self.page_size, self.device
            )
            self.free_pages = self.free_pages[needed:]
            return slots

        def alloc_decode(
            self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
        ) -> torch.Tensor | None:
            opens_page = (seq_lens - 1) % self.page_size == 0
            needed = int(opens_page.sum())
            if self.need_sort and needed > len(self.free_pages):
                self.merge_and_sort_free()
            if needed > len(self.free_pages):
                return None
            slots = last_loc.to(torch.int64) + 1
            slots[opens_page] = self.free_pages[:needed] * self.page_size
            self.free_pages = self.free_pages[needed:]
            return slots

    return TorchPagedAllocator
