"""Start SGLang's own throughput tools with the plugin loaded.

``python -m kascade_sglang.bench {one_batch,offline_throughput} [the tool's arguments]``

These tools parse arguments before SGLang loads plugins, so `kascade` would be an invalid choice.
"""

import importlib
import sys

from sglang.srt.plugins import load_plugins

TOOLS = ("one_batch", "offline_throughput")

# At module level: processes that the tool spawns import this file again and need the plugin too.
load_plugins()


def main() -> None:
    """Run one tool; exits with status 2 for an unknown name."""
    if len(sys.argv) < 2 or sys.argv[1] not in TOOLS:
        sys.exit(f"usage: python -m kascade_sglang.bench {{{','.join(TOOLS)}}} [arguments]")
    tool = sys.argv.pop(1)
    importlib.import_module(f"sglang.benchmark.{tool}").cli_main()


if __name__ == "__main__":
    main()
