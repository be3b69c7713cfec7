"""Python starts with this where the tests pretend that the processor computes in bfloat16
(PRETEND_BF16=1).
"""

import pathlib
from typing import Any

read_text = pathlib.Path.read_text


def with_bf16(path: pathlib.Path, *args: Any, **kwargs: Any) -> str:
    """Read a file; the system's word on the processor gets the flag that `ldm.host` looks for."""
    text = read_text(path, *args, **kwargs)
    return (
        text.replace("flags\t\t:", "flags\t\t: avx512_bf16")
        if str(path) == "/proc/cpuinfo"
        else text
    )


pathlib.Path.read_text = with_bf16  # type: ignore[method-assign]
