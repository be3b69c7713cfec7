"""New words in files of other programs: written, read again bit for bit, and judged by diffusers."""

import pytest
import torch

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.embeddings import read_embeddings, read_words, write_words
from ldm.checkpoints.pipeline_folder import save_pipeline
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.embedding_manager import EmbeddingManager
from scripts import convert
from tests.support import golden
from tests.support.families import noise, params

WIDTHS = {"v1": 32, "v2": 64}
ROWS = noise(3, 32)


@pytest.mark.parametrize("name, layout", [
    ("my-dog.safetensors", "webui"), ("my-dog.pt", "webui"), ("my-dog.pt", "ldm"),
])  # fmt: skip
@pytest.mark.parametrize("word", ["*", "<my-dog>"])
def test_vectors_come_back_bit_for_bit(tmp_path, name, layout, word):
    (file,) = write_words({word: ROWS}, tmp_path / name, layout)
    (found,) = read_embeddings(file)
    assert torch.equal(found.vectors, ROWS) and found.vectors.dtype == ROWS.dtype
    # The web UIs' layout has no word: theirs is the file's name.
    assert word in found.words or (layout == "webui" and name.endswith(".pt"))
    assert "my-dog" in [text.strip("<>") for text in found.words]


def test_what_ldm_reads_is_in_its_layout(tmp_path):
    both = {"*": ROWS, "<my-dog>": -ROWS[:1]}
    (file,) = write_words(both, tmp_path / "embeddings.pt", "ldm")
    content = torch.load(file, weights_only=False)
    # As `EmbeddingManager.load` of latent-diffusion uses them.
    assert isinstance(content["string_to_param"], torch.nn.ParameterDict)
    assert {word: len(rows) for word, rows in content["string_to_param"].items()} == {
        "*": 3, "<my-dog>": 1,
    }  # fmt: skip
    assert all(token.ndim == 0 for token in content["string_to_token"].values())
    # A web UI takes one word a file.
    files = write_words(both, tmp_path / "learned_embeds.safetensors")
    assert [file.name for file in files] == [f"learned_embeds-{n}.safetensors" for n in (1, 2)]
    assert torch.equal(read_embeddings(files[1])[0].vectors, -ROWS[:1])


@pytest.mark.parametrize("family", WIDTHS)
def test_diffusers_reads_what_we_write_and_we_read_what_it_has(family, tmp_path):
    """A prompt with the word means the same there: each program's own model, tokenizer, file."""
    diffusers = pytest.importorskip("diffusers")
    model = LatentDiffusion(**params(family))
    golden.load_golden_weights(model)
    model.eval().requires_grad_(False)
    save_pipeline(model, params(family), tmp_path / "pipeline")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    rows = noise(2, WIDTHS[family])
    (diffusers_file,) = write_words({"<my-dog>": rows}, tmp_path / "learned_embeds.safetensors")
    (web_file,) = write_words({"<my-cat>": -rows}, tmp_path / "web.pt")
    theirs.load_textual_inversion(diffusers_file)
    theirs.load_textual_inversion(web_file)

    first = theirs.tokenizer.convert_tokens_to_ids("<my-dog>")
    table = theirs.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[first : first + 2], rows)
    manager = EmbeddingManager(model.cond_stage_model)
    assert manager.load(read_embeddings(diffusers_file))[0] == "<my-dog>"
    manager.load(read_embeddings(web_file))
    ours = model.get_learned_conditioning(["photo of a <my-dog> beside web"])
    prompt = "photo of a <my-dog> beside <my-cat>"
    expected, _ = theirs.encode_prompt(prompt, "cpu", 1, False)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    plain, _ = theirs.encode_prompt("photo of a dog beside a cat", "cpu", 1, False)
    assert (ours - plain).abs().max() > 0.01


def test_a_folder_that_leaves_words_out_says_so(tmp_path, caplog):
    model = LatentDiffusion(**params("v1"))
    state = {**model.state_dict(), "embedding_manager.string_to_param_dict.*": ROWS}
    config = {"model": {"target": golden.TARGET, "params": params("v1")}}
    torch.save({"state_dict": state, "config": config}, tmp_path / "last.ckpt")
    Checkpoint.open(tmp_path / "last.ckpt").save(tmp_path / "folder")
    assert "folder: a diffusers folder holds no new words" in caplog.text
    assert "scripts/convert.py --words" in caplog.text and (tmp_path / "folder/unet").is_dir()


def test_the_command_takes_words_out_of_checkpoints_and_from_one_layout_to_another(
    tmp_path, capsys
):
    checkpoint = tmp_path / "last.ckpt"
    key = "embedding_manager.string_to_param_dict.*"
    torch.save({"state_dict": {key: ROWS, "betas": torch.ones(2)}}, checkpoint)
    for source, name, more in [
        (checkpoint, "a.safetensors", []),
        (tmp_path / "a.safetensors", "b.pt", ["--words", "ldm"]),
        (tmp_path / "b.pt", "c.pt", []),
        (tmp_path / "c.pt", "d.safetensors", []),
    ]:
        flags = ["--ckpt", str(source), "--output", str(tmp_path / name), *(more or ["--words"])]
        assert convert.main(flags) == 0
        (rows,) = read_words(tmp_path / name).values()
        assert torch.equal(rows, ROWS)
        assert str(tmp_path / name) in capsys.readouterr().out
    assert convert.main(flags) == 1
    assert convert.main([*flags, "--overwrite"]) == 0
    assert convert.main([*flags, "--only", "x"]) == 1
    with pytest.raises(UserError, match=r"ends in \.safetensors or \.pt"):
        write_words({"*": ROWS}, tmp_path / "x.ckpt")
