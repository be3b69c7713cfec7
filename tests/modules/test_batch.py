"""`Batch` reads what a data loader yields: a subject's examples, or a (subject, prior) pair."""

import pytest
import torch

from ldm.modules.losses.batch import Batch, named_parts
from tests.support.models import SIZE, batch


@pytest.mark.parametrize("pair", [tuple, list])
def test_a_pair_is_subject_and_prior(pair):
    subject, prior = batch(1, 2), batch(11, 12, 13, caption="photo of a dog")
    both = Batch.of(pair([subject, prior]))
    assert [len(part) for part in both.parts] == [2, 3] and both.parts == [both.subject, both.prior]
    assert both.captions == subject["caption"] + prior["caption"]
    expected = torch.cat([subject["image"], prior["image"]]).permute(0, 3, 1, 2)
    assert torch.equal(both.images, expected) and both.images.is_contiguous()
    assert [part.tolist() for part in both.split(torch.arange(5))] == [[0, 1], [2, 3, 4]]


def test_a_mapping_is_the_subject_alone():
    alone = Batch.of(batch(1))
    assert alone.prior is None and alone.parts == [alone.subject]
    assert alone.subject.seeds == [1] and alone.subject.masks is None and alone.moments is None
    assert named_parts({"a": 1}) == {"subject": {"a": 1}}


def test_first_cuts_every_entry_of_every_part():
    masked = batch(1, 2) | {"mask": torch.arange(2.0)[:, None, None].expand(2, SIZE, SIZE)}
    cut = Batch.of((masked, batch(3))).first(1)
    assert cut.captions == ["photo of a sks dog 1", "photo of a sks dog 3"]
    assert cut.subject.masks.max() == 0 and cut.subject.seeds == [1] and cut.images.shape[0] == 2


def test_cached_latents_stand_for_images():
    moments = {"moments": torch.randn(2, 8, 4, 4), "caption": ["a", "b"]}
    both = Batch.of((moments, moments))
    assert both.images is None and both.moments.shape == (4, 8, 4, 4)
    mixed = Batch.of((moments, batch(1)))
    assert mixed.images is None and mixed.moments is None


def test_a_config_names_the_entries():
    other = {"jpg": batch(1)["image"], "txt": ["a dog"]}
    found = Batch.of(other, image_key="jpg", caption_key="txt")
    assert found.captions == ["a dog"] and found.images.shape == (1, 3, SIZE, SIZE)


def test_other_numbers_of_parts_are_refused():
    with pytest.raises(ValueError, match="got 3"):
        Batch.of([batch(1)] * 3)
    with pytest.raises(ValueError, match="got 0"):
        Batch.of([])
