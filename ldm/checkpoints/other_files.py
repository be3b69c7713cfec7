"""Files that are no checkpoint, and weights of something else: named in one line, with the way out.

`of_bytes` looks at what lies on the disk before it is read; `of_content` and
`of_weights` look at what was read. Each returns a text that ends a message, or None where nothing
speaks against a checkpoint.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.layouts import unwrapped
from ldm.checkpoints.unpickle import is_module
from ldm.files import size_text

AGAIN = "download it again"

# ---- by the first bytes --------------------------------------------------------------------------

HEAD = 4096  # bytes that are looked at
ORIGINAL = "give the .safetensors or .ckpt that it was made of"
OF_PYTORCH = "not a checkpoint of PyTorch: give the .safetensors or .ckpt of this model"
PICTURE = "a picture, not a checkpoint: give the file of the weights"
ARCHIVE = "archive, not a checkpoint: unpack it, and give the file of the weights in it"

# What a file is that begins so.
SIGNATURES = {
    b"GGUF": f"a GGUF file, whose quantised weights are not read: {ORIGINAL}",
    b"ggml": f"a GGML file, whose quantised weights are not read: {ORIGINAL}",
    b"\x89HDF": f"an HDF5 file (Keras), {OF_PYTORCH}",
    b"\x93NUMPY": "a numpy array, not a checkpoint: give the .safetensors or .ckpt of this model",
    b"\x89PNG": PICTURE,
    b"\xff\xd8\xff": PICTURE,
    b"GIF8": PICTURE,
    b"%PDF": "a PDF document, not a checkpoint: give the file of the weights",
    b"\x7fELF": "a program, not a checkpoint: give the file of the weights",
    b"MZ": "a program, not a checkpoint: give the file of the weights",
    b"\x1f\x8b": f"a gzip {ARCHIVE}",
    b"BZh": f"a bzip2 {ARCHIVE}",
    b"7z\xbc\xaf\x27\x1c": f"a 7z {ARCHIVE}",
    b"\xfd7zXZ\x00": f"an xz {ARCHIVE}",
    b"\x28\xb5\x2f\xfd": f"a zstd {ARCHIVE}",
    b"Rar!": f"a rar {ARCHIVE}",
}

LFS = b"version https://git-lfs"
ONNX = re.compile(
    rb"\x08[\x01-\x20](?:\x12|\x1a|\x3a|\x42)"
)  # ir_version, then a field that follows it
PARTIAL = (".part", ".partial", ".crdownload", ".aria2", ".download", ".tmp", ".incomplete", ".!ut")
# Names of files with weights, in the order in which a folder's are offered.
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def of_bytes(path: Path) -> str | None:
    """Return what a file is, from its first bytes, where those are no checkpoint's."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not head:
        return f"truncated or not a checkpoint: it is empty (0 bytes): {AGAIN}"
    if path.suffix in PARTIAL:
        return (
            f"an unfinished download ({path.suffix}), not a checkpoint: let it finish, or {AGAIN}"
        )
    if head.startswith(LFS):
        return _lfs_pointer(head)
    for beginning, what in SIGNATURES.items():
        if head.startswith(beginning):
            return what
    if path.suffix == ".onnx" or (
        ONNX.match(head) and b"onnx" in head.lower() + path.name.lower().encode()
    ):
        return f"an ONNX model, whose graph is not read: {ORIGINAL}"
    if head[4:8] == b"TFL3":
        return f"a TensorFlow Lite model, {OF_PYTORCH}"
    if len(head) > 64 and not head.strip(b"\0"):
        zeros = "it begins with zeros alone, as an unfinished download does"
        return f"truncated or not a checkpoint: {zeros}: {AGAIN}"
    if head.startswith(b"PK\x03\x04") or head.startswith(b"PK\x05\x06"):
        return _other_zip(path)
    return _text(path, head)


def _lfs_pointer(head: bytes) -> str:
    """Return what to do about a Git LFS pointer, with the size of the file that it stands for."""
    size = re.search(rb"size (\d+)", head)
    of_size = f" of {size_text(int(size[1]))}" if size else ""
    return (
        f"a Git LFS pointer, not the file{of_size} that it stands for: run 'git lfs pull' in its "
        "repository, "
        "or download the file itself"
    )


def _other_zip(path: Path) -> str | None:
    """Return what a zip archive is that torch did not write; None for one that it did, or that
    cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return None
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return f"an archive of numpy arrays, {OF_PYTORCH}"
    inside = next(
        (name for name in names if name.endswith(WEIGHT_SUFFIXES)), names[0] if names else "nothing"
    )
    return f"a zip {ARCHIVE} ({len(names)} files, such as '{inside}')"


def _text(path: Path, head: bytes) -> str | None:
    """Return which kind of text a file is; None for binary ones."""
    try:
        text = head.decode("utf-8-sig", errors="strict" if len(head) < HEAD else "ignore").strip()
    except UnicodeDecodeError:
        return None
    if len(head) < 16 or not text or not all(sign.isprintable() or sign.isspace() for sign in text):
        return None
    beginning = text[:400].lower()
    if "<html" in beginning or beginning.startswith("<!doctype html"):
        return (
            "an HTML page, not a checkpoint: the link led to a web page (a login, a licence to "
            "accept), and the page "
            "was saved; download the file itself"
        )
    if beginning.startswith(("<?xml", "<error")):
        return f"an XML text, not a checkpoint, as a server's error is: '{_short(text)}'; {AGAIN}"
    if beginning.startswith(("{", "[")):
        return f"a JSON text, not a checkpoint: '{_short(text)}'; {_way_out_of_json(path)}"
    if path.suffix in (".yaml", ".yml"):
        return "a YAML text, not a checkpoint: it is a config; give the file of the weights"
    return f"a text, not a checkpoint: '{_short(text)}'; give the file of the weights"


def _way_out_of_json(path: Path) -> str:
    if path.name in ("model_index.json", "config.json"):
        return f"give the folder that it is in, {path.parent}"
    return "give the file of the weights"


def _short(text: str) -> str:
    """Return the beginning of a text on one line."""
    return " ".join(text.split())[:60]


# ---- by what was read ----------------------------------------------------------------------------

SUPPORTED = "Stable Diffusion 1 and 2 are read"
NEEDS_WHOLE = "a whole model is needed"


@dataclass(frozen=True)
class Kind:
    """Weights of something else.

    Args:
        name: what they are.
        way_out: what to do instead.
        found: matches a key of them.
        but_not: matches a key that they do not have.
        is_part: whether they are a network of a model, which can be converted by itself.
    """

    name: str
    way_out: str
    found: re.Pattern[str]
    but_not: re.Pattern[str] | None = None
    is_part: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.way_out}"

    def fits(self, keys: Collection[str]) -> bool:
        """Whether weights of these names are of this kind."""
        if self.but_not is not None and any(self.but_not.search(key) for key in keys):
            return False
        return any(self.found.search(key) for key in keys)


def _kind(name: str, way_out: str, found: str, but_not: str = "", is_part: bool = False) -> Kind:
    return Kind(name, way_out, re.compile(found), re.compile(but_not) if but_not else None, is_part)


UNET = r"^model\.diffusion_model\."
OTHER_KIND = f"not read: {SUPPORTED}"
OTHER_CASCADE = (
    "not read: of cascades, those that are trained here are, and Stable Diffusion's x4 upscaler "
    "(docs/cascade.md)"
)

LORA = _kind(
    "a LoRA, not a whole model",
    "merge it into the model that it was made for (scripts/convert.py --ckpt MODEL --lora THIS)",
    r"^lora_(unet|te\d?|prior)_|[._]lora[._](down|up|mid|A|B)\b|lora_linear_layer"
    r"|\.hada_w[12]|\.lokr_w[12]|\.oft_",
    r"\.base_layer\.",
)
EMBEDDING = _kind(
    "a textual-inversion embedding, not a whole model",
    "give it beside a model (stable_txt2img.py --embedding_path, main.py --embedding_manager_ckpt)",
    r"^(string_to_param|emb_params|clip_[lg])$",
)
IP_ADAPTER = _kind(
    "an IP-Adapter, not a whole model", NEEDS_WHOLE, r"^(ip_adapter|image_proj)(\.|$)", UNET
)

# In this order: the first that fits says what a file is.
KINDS = (
    LORA,
    EMBEDDING,
    _kind(
        "a ControlNet, not a whole model",
        "give the model that it steers, it is not needed for training or sampling here",
        r"^(module\.)?control_model\.|^controlnet_(cond_embedding|down_blocks)\."
        r"|^input_hint_block\.",
        UNET,
    ),
    IP_ADAPTER,
    _kind(
        "a T2I-Adapter, not a whole model",
        NEEDS_WHOLE,
        r"^(adapter\.)?body\.\d+\.(block1|resnets|in_conv)\b",
        UNET,
    ),
    _kind(
        "an AnimateDiff motion module, not a whole model", NEEDS_WHOLE, r"motion_modules\.", UNET
    ),
    _kind(
        "an upscaler, not a model that draws",
        NEEDS_WHOLE,
        r"RRDB_trunk|rdb1\.|\.RDB1\.|^model\.1\.sub\.",
    ),
    _kind("a Stable Diffusion unCLIP model", OTHER_KIND, r"^noise_augmentor\."),
    _kind(
        "a Stable Diffusion XL model",
        OTHER_KIND,
        r"^conditioner\.embedders\.1\.|^model\.diffusion_model\.label_emb\.\d"
        r"|^add_embedding\.linear_1\.",
    ),
    _kind("a Stable Diffusion 3 model", OTHER_KIND, r"(^|\.)joint_blocks\."),
    _kind("a Flux model", OTHER_KIND, r"(^|\.)double_blocks\.|(^|\.)single_transformer_blocks\."),
    _kind("a Stable Cascade model", OTHER_KIND, r"(^|\.)clip_txt(_pooled)?_mapper\."),
    _kind("a DeepFloyd IF model", OTHER_CASCADE, r"(^|\.)(encoder_pooling|aug_proj)\.\d+\."),
    _kind(
        "a model of imagen-pytorch or dalle2-pytorch",
        OTHER_CASCADE,
        r"(^|\.)unets\.\d+\.|(^|\.)to_(lowres_)?time_hiddens\.",
    ),
    _kind("a GLIDE model", OTHER_CASCADE, r"^transformer_proj\."),
    _kind("a Stable Video Diffusion model", OTHER_KIND, r"\.time_(stack|mixer)\."),
    _kind("a diffusion transformer", OTHER_KIND, r"(^|\.)(adaln_single|t_embedder|x_embedder)\."),
    _kind(
        "a latent diffusion model with a BERT text encoder",
        OTHER_KIND,
        r"^cond_stage_model\.transformer\.(token_emb|attn_layers)\.",
    ),
    _kind(
        "a model with quantised weights",
        "they are not read: give the model in 16 or 32 bits",
        r"\.quant_state\.|\.absmax$|\.qweight$|\.scale_weight$|\.weight_scale$|^scaled_fp8$",
    ),
    _kind(
        "the networks of a diffusers pipeline in one file",
        "give the pipeline's folder",
        r"^(unet|vae|text_encoder)\.(down_blocks|encoder|text_model|conv_in)\b",
    ),
    _kind(
        "the UNet of a diffusers pipeline alone, not a whole model",
        "give the pipeline's folder",
        r"^down_blocks\.\d+\.(resnets|attentions)\.",
        is_part=True,
    ),
    _kind(
        "a UNet alone, not a whole model",
        f"{NEEDS_WHOLE}, with text encoder and autoencoder",
        r"^(model\.)?(diffusion_model\.)?input_blocks\.0\.0\.weight",
        r"^(first_stage_model|cond_stage_model)\.",
        is_part=True,
    ),
    _kind(
        "an autoencoder alone, not a whole model",
        "put it into a model (scripts/convert.py --ckpt MODEL --vae THIS)",
        r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|conv_out)\.weight",
        r"^(model\.|cond_stage_model)",
        is_part=True,
    ),
    _kind(
        "a text encoder alone, not a whole model",
        NEEDS_WHOLE,
        r"^(cond_stage_model\.)?(clip\.|model\.|transformer\.)?(text_model\.)?"
        r"(embeddings\.token_embedding|token_embedding|shared"
        r"|encoder\.block\.0\.layer\.0\.SelfAttention\.q)\.",
        r"^(model\.diffusion_model|first_stage_model)\.",
        is_part=True,
    ),
)

HYPERNETWORK = "a hypernetwork, not a whole model: not read; give the model that it was trained on"
OPTIMIZER = (
    "the state of an optimizer alone, without weights: give the file of the weights, which a "
    "training writes beside it"
)


def of_content(content: Mapping[Any, Any]) -> str | None:
    """Return what a read file holds, where that is no named weights."""
    is_embedding = (
        "string_to_param" in content or "emb_params" in content or _is_one_vector(content)
    )
    if is_embedding:
        return str(EMBEDDING)
    if is_hypernetwork(content):
        return HYPERNETWORK
    if {"image_proj", "ip_adapter"} <= set(content):
        return str(IP_ADAPTER)
    for key, value in content.items():
        if is_module(value):
            return (
                f"not weights: its '{key}' is a whole pickled module: save its state_dict() instead"
            )
    has_weights = unwrapped(content) is not content
    optimizer = {"param_groups", "optimizer_states", "optimizer_state_dict", "optimizer"} & set(
        content
    )
    if (
        optimizer
        and not has_weights
        and not any(isinstance(value, Tensor) for value in content.values())
    ):
        return OPTIMIZER
    return None


def is_hypernetwork(content: Mapping[Any, Any]) -> bool:
    """Whether a read file is a hypernetwork: the layers of each width under the width's number."""
    return "layer_structure" in content or any(
        str(key).isdigit() and isinstance(value, (list, tuple)) for key, value in content.items()
    )


def _is_one_vector(content: Mapping[Any, Any]) -> bool:
    """Whether a file is a diffusers embedding: one word, or two, and their vectors."""
    vectors = [value for value in content.values() if isinstance(value, Tensor)]
    wide = all(value.ndim in (1, 2) and value.shape[-1] >= 64 for value in vectors)
    return (
        0 < len(content) == len(vectors) <= 2
        and wide
        and not any("." in str(key) for key in content)
    )


def of_weights(keys: Iterable[str]) -> Kind | None:
    """Return the kind of something else whose names these are."""
    keys = list(keys)
    for kind in KINDS:
        if kind.fits(keys):
            return kind
    return None
