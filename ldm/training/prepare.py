"""What a training needs beside its data: class images that the model draws, and images as
latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.data.concepts import Concept
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.latents import CachedLatents, Encoder, digest, encode_variants
from ldm.data.personalized import PersonalizedBase
from ldm.distributed import first_alone
from ldm.errors import UserError
from ldm.files import alone_in
from ldm.host import is_out_of_memory
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder
from ldm.modules.encoders.tokenizer import warn_of_cut
from ldm.sampling.class_images import check_class, make_class_images
from ldm.training.stages import Stages

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from ldm.models.diffusion.ddpm import LatentDiffusion

LATENTS = "latents"  # a stage
FIRST_STAGE = "first_stage_model."  # how the keys of an autoencoder's weights begin


def check_images(data: DataModuleFromConfig) -> None:
    """Refuse images that do not decode, and class images that were made for another class.

    Raises:
        UserError: for either of them.
    """
    if not isinstance(data, DataModuleFromConfig):
        return
    data.check()
    for prior in (concept.prior for concept in data.concepts):
        if isinstance(prior, PersonalizedBase):
            own = [path for path in prior.paths if path not in prior.captioned]
            check_class(own, prior.class_word, prior.templates)


def prepare(
    model: Any,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    stages: Stages,
    resume_from: Path | None = None,
) -> None:
    """Make the class images that lack and the latents that are to be cached, and open the data.

    Nothing random of the training depends on it.

    Args:
        model: with its initial weights; those of a resumed run are in `resume_from`.
        stages: learns how long the class images and the latents take.

    Raises:
        UserError: a resumed run lacks something that only its untrained model can make.
    """
    if not isinstance(data, DataModuleFromConfig):
        return
    _warn_of_cut_captions(model, data)

    # What is in files is made once for all processes of the run.
    first_alone(lambda: _make_files(model, data, trainer, stages, resume_from is not None))
    data.setup("fit")

    # What is in memory, each process makes for itself.
    if data.latent_cache:
        if resume_from is not None:
            _load_first_stage(model, resume_from)
        _cache_latents(model, data, trainer)
    stages.end(LATENTS)


def _warn_of_cut_captions(model: nn.Module, data: DataModuleFromConfig) -> None:
    """Quote what the text encoder will not read of the captions."""
    encoder = getattr(model, "cond_stage_model", None)
    if isinstance(encoder, (FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder)):
        found = data.summary()
        texts = [*found["subject_prompts"], *found["class_prompts"]]
        warn_of_cut(texts, encoder.max_length, encoder.all_added_words())


def _make_files(
    model: Any, data: DataModuleFromConfig, trainer: pl.Trainer, stages: Stages, resumes: bool
) -> None:
    """Fill latent caches of whole datasets, and draw the class images that the folder lacks."""
    device = trainer.strategy.root_device
    for dataset in data.datasets.values():
        if not isinstance(dataset, CachedLatents):
            continue
        if resumes:
            dataset.fill(None)
            continue
        with _moved(model.first_stage_model, device, model.device):
            dataset.fill(encoder_of(model, device))
    stages.end(LATENTS)

    # Each subject's class, one after another: of a folder that two share, the second lacks nothing.
    for concept in data.concepts:
        if concept.class_images_to_make:
            _make_class_images(model, data, concept, device, resumes)
    stages.end("class images")


def _make_class_images(
    model: LatentDiffusion,
    data: DataModuleFromConfig,
    concept: Concept,
    device: torch.device,
    resumes: bool,
) -> None:
    """Draw the class images that a subject's folder lacks."""
    folder, missing = concept.class_folder, concept.class_images_to_make
    if resumes:  # a tuned model's images are not its prior
        raise UserError(
            f"{folder}: {missing} of {data.num_class_images} class images are missing, and only "
            "a new "
            "run makes them: put them back, or lower data.params.num_class_images"
        )
    try:
        # Of trainings that share the folder, the first one fills it. The others find it full.
        with alone_in(folder):
            if missing := concept.class_images_to_make:
                make_class_images(
                    model=model,
                    folder=folder,
                    prompts=concept.class_prompts,
                    count=missing,
                    size=concept.class_size,
                    seed=data.seed,
                    device=device,
                    **data.class_images,
                )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{device}: out of memory while class images are made. To need less: lower "
            "data.params.class_images.batch_size; the images made so far are kept"
        ) from error
    left = concept.class_images_to_make
    assert not left, f"{left} class images are still missing in {folder}"


def encoder_of(model: LatentDiffusion, device: torch.device) -> Encoder:
    """Return what encodes images by a model's first stage, which is on `device`, in full
    precision.
    """

    def encode(images: Tensor) -> Tensor:
        return model.encode_first_stage(images.to(device)).parameters

    return Encoder(encode, digest(model.first_stage_model))


def _cache_latents(model: LatentDiffusion, data: DataModuleFromConfig, trainer: pl.Trainer) -> None:
    """Encode the subject's and the class's images, in the precision that a step would do it in."""
    device = trainer.strategy.root_device
    folder = Path(data.latent_cache).expanduser() if isinstance(data.latent_cache, str) else None

    def encode(images: Tensor) -> Tensor:
        with trainer.precision_plugin.forward_context():
            return model.encode_first_stage(images.to(device)).parameters

    # Files of the cache are named after what has made them; without files nobody asks.
    name = f"{digest(model.first_stage_model)} {trainer.precision}" if folder else ""
    with _moved(model.first_stage_model, device, model.device):
        for kind in ("train", "reg"):
            for dataset in data.each(kind):
                dataset.latents = encode_variants(
                    dataset, Encoder(encode, name), data.batch_size, folder
                )


@contextmanager
def _moved(module: nn.Module, device: torch.device, home: torch.device) -> Iterator[None]:
    """Move a network to `device` inside, and back home afterwards."""
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def _load_first_stage(model: LatentDiffusion, checkpoint: Path) -> None:
    """Give the first stage its weights before Lightning restores the whole model."""
    state = state_dict_of(read_checkpoint(checkpoint), checkpoint)
    own = {
        key.removeprefix(FIRST_STAGE): state[key] for key in state if key.startswith(FIRST_STAGE)
    }
    model.first_stage_model.load_state_dict(own, strict=False)
