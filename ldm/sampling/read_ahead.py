"""Less memory for commands, which know all of their prompts before they draw.

They read the prompts first. Then nothing reads a text any more, so the text encoder's weights are
freed. Where no photo is read, those of the autoencoder's encoder are, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.files import tensor_bytes
from ldm.host import give_back_free_pages
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.inpainting import inpaints
from ldm.sampling.precision import computing_in
from ldm.sampling.prompting import read_prompts
from ldm.sampling.series import Batch
from ldm.sampling.text_to_image import has_guide

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion


class Freed(nn.Module):
    """Stands where a network was whose weights are freed.

    Args:
        name: of the network, for the message.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, *_: object) -> NoReturn:
        raise UserError(f"the {self.name} was freed before the drawing: load the model again")


def reading_ahead(
    model: LatentDiffusion, precision: str, photos: bool = False
) -> Callable[[Sequence[Batch]], None]:
    """Return what calls `read_ahead` for the batches that a command is about to draw."""
    return lambda batches: read_ahead(model, batches, precision, photos)


@torch.no_grad()
def read_ahead(
    model: LatentDiffusion, batches: Sequence[Batch], precision: str, photos: bool = False
) -> None:
    """Read the texts of batches, and free the networks that have no more to do.

    Afterwards the model draws these batches, to the same pixels, and reads no other text. So this
    is for who owns the model, and needs it for nothing else. Where a guide is compared with the
    model, or the texts take more than their encoder, nothing is freed.

    Args:
        photos: whether photos will be encoded.
    """
    # A guide is compared with all of the tuned model, whenever it is loaded.
    if any(has_guide(batch.pictures[0].recipe) for batch in batches):
        return
    # Each batch as it will be drawn: in a batch of another size kernels may round differently.
    known: dict[tuple[tuple[str, ...], str | None], Tensor] = {}
    model.known_texts = known
    limit = tensor_bytes(list(model.cond_stage_model.parameters()))
    with computing_in(model, precision):
        for batch in batches:
            prompts, first = [picture.prompt for picture in batch.pictures], batch.pictures[0]
            read_prompts(model, prompts, first.negative_prompt, first.recipe)
            if tensor_bytes(known) > limit:
                model.known_texts = None
                return
    model.add_module("cond_stage_model", Freed("text encoder"))

    # A model that inpaints reads a picture even for a text alone: a grey one.
    autoencoder = model.first_stage_model
    if isinstance(autoencoder, AutoencoderKL) and not photos and not inpaints(model):
        autoencoder.add_module("encoder", Freed("autoencoder's encoder"))
    give_back_free_pages()
