"""The miniature's subjects are a dataset in the published layout of DreamBench."""

from ldm.config import PROJECT
from ldm.data.finding import find_images
from ldm.evaluation.dreambench import read_dataset
from ldm.tiny.colours import COLOURS
from ldm.tiny.encoders import miniature_nouns
from ldm.tiny.materials import MATERIALS
from ldm.tiny.scenes import SCENES


def test_every_subject_has_photos_and_prompts_that_the_miniature_knows():
    folder = PROJECT / "models/tiny/subjects"
    subjects = read_dataset(folder)
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    assert {subject.name for subject in subjects} == names
    for subject in subjects:
        assert len(find_images(subject.photos)) == 5
        assert subject.class_word in miniature_nouns()
        assert len(set(subject.templates)) == 25  # as the paper's lists
        for prompt in subject.prompts("sks"):
            before, after = prompt.split(f"sks {subject.class_word}")
            adjective = before.split()[1:]
            assert after.strip() in SCENES or adjective[0] in {*COLOURS, *MATERIALS}
