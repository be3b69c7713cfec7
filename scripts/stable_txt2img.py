"""Sample pictures from a checkpoint: the name and the flags that CompVis's scripts have.

    python scripts/stable_txt2img.py --ddim_eta 0.0 --n_samples 8 --scale 10 --ddim_steps 100 \\
        --ckpt logs/.../checkpoints/last.ckpt --prompt "photo of a sks dog on the beach"

It is `scripts/txt2img.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    # Python looks for modules in this file's folder, and the scripts are a package in its parent.
    root = str(Path(__file__).resolve().parents[1])
    if root not in sys.path:
        sys.path.insert(0, root)
    from scripts import txt2img

    return txt2img.main(argv)


if __name__ == "__main__":
    sys.exit(main())
