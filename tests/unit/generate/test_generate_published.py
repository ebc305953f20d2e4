"""Published checkpoints: tiny random folders that diffusers writes, sampled as diffusers samples them; and every bad folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.diffusion.guidance import guided
from tubelet.diffusion.objectives import denoiser
from tubelet.diffusion.paths import VPLinear
from tubelet.diffusion.solvers import SOLVERS
from tubelet.generate import layouts
from tubelet.generate.clip import read_settings
from tubelet.generate.engine import Request, Sampling
from tubelet.generate.layouts import Chain, read_chain
from tubelet.generate.published import ClassNames, Published, load_published
from tubelet.models.dit import PUBLISHED_NAMES, DiTConfig
from tubelet.nn.adaln_zero import sincos_plane
from tubelet.tasks.given import Given
from tubelet.text.clip_bpe import _LETTERS, CLIPTokenizer

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

WORDS = "A lower tower, 2 of them!"
MERGES = ["l o", "lo w", "low e", "lowe r</w>", "t h", "e r</w>", "' s</w>", "Ã ©</w>", "! !</w>"]


def vocabulary() -> dict[str, int]:
    """As CLIP's: every byte, every byte that ends a word, what the merges make, and the two marks last."""
    tokens = [*_LETTERS.values(), *(f"{letter}</w>" for letter in _LETTERS.values()), *(m.replace(" ", "") for m in MERGES)]
    return {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


class Pair(NamedTuple):
    """A checkpoint as diffusers has it in memory and as a folder."""

    pipeline: Any
    folder: Path


def autoencoder() -> Any:
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16, **kinds).eval()


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Stable Diffusion 1 in two levels: 16 x 16 pixels, 8 x 8 latents."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
    )
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(vocabulary()), **sizes))
    for parameter in text.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)  # fresh ones hardly tell words apart
    words = CLIPTokenizer(vocab=vocabulary(), merges=[tuple(m.split()) for m in MERGES], model_max_length=77)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    pipeline = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text.eval(),
        tokenizer=words,
        unet=unet.eval(),
        scheduler=DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("published") / "stable"
    pipeline.save_pretrained(folder)
    return Pair(pipeline, folder)


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A DiT of two blocks with one embedder, as converted from published weights: 16 x 16 pixels, 8 x 8 latents."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(1)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "out_channels": 8}
    transformer = DiTTransformer2DModel(**sizes, num_embeds_ada_norm=1000).eval()  # 1000: the pipeline's null class
    for block in transformer.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(transformer.transformer_blocks[0].norm1.emb.state_dict())
    pipeline = DiTPipeline(transformer, autoencoder(), DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("published") / "dit"
    pipeline.save_pretrained(folder)
    # save_pretrained forgets the names, the published folder has them.
    names = {"0": "tench, Tinca tinca", "7": "cock", "134": "crane", "517": "crane", "999": "toilet tissue, toilet paper"}
    edit(folder / "model_index.json", id2label=names)
    return Pair(pipeline, folder)


@pytest.fixture(scope="module")
def painter(stable: Pair) -> Published:
    return load_published(stable.folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def sorter(dit: Pair) -> Published:
    return load_published(dit.folder, device="cpu", dtype="float32")


def edit(path: Path, **changes: Any) -> None:
    """Change settings in a JSON file; None removes one."""
    told = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in told.items() if key not in changes or value is not None}))


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(clip: Any) -> Tensor:
    """A picture as diffusers gives it: `(1, 3, H, W)` in [0, 1]."""
    return (clip.video.pixels[:, :, 0] + 1) / 2


# Parity with diffusers


def test_stable_diffusion_is_sampled_as_diffusers_does(stable: Pair, painter: Published) -> None:
    for words, steps, guidance in ((WORDS, 12, 7.5), ("tower's", 5, 1.5), (" ".join(["lower"] * 99), 2, 4.0)):
        mine = painter.generate(words, seed=3, steps=steps, guidance=guidance, solver="ddim")
        latents = torch.randn(1, 4, 8, 8, generator=noise(3))
        asked = {"num_inference_steps": steps, "guidance_scale": guidance, "height": 16, "width": 16}
        yours = stable.pipeline(words, latents=latents, output_type="pt", **asked).images
        assert yours.std() > 0.05
        torch.testing.assert_close(pixels(mine), yours, atol=1e-5, rtol=0)


def as_published(transformer: Any, so: bool) -> None:
    """Undo where diffusers' DiT deviates from the published one (docs/published.md), or do it again."""
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0 if so else 1
        block.norm3.eps = 1e-6 if so else 1e-5


def test_dit_is_sampled_as_diffusers_does_once_its_deviations_are_undone(dit: Pair, sorter: Published) -> None:
    def yours(steps: int) -> Tensor:
        made = dit.pipeline([7], 4.0, [noise(3)], num_inference_steps=steps, output_type="pt")
        return made.images

    for steps in (5, 12):
        mine = pixels(sorter.generate("7", seed=3, steps=steps, guidance=4.0, solver="ddim"))
        as_published(dit.pipeline.transformer, False)
        assert (yours(steps) - mine).abs().max() > 2e-3
        as_published(dit.pipeline.transformer, True)
        assert mine.std() > 0.05
        torch.testing.assert_close(mine, yours(steps), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["stable", "dit"])
@torch.no_grad()
def test_one_step_is_exact(kind: str, request: pytest.FixtureRequest) -> None:
    pair: Pair = request.getfixturevalue(kind)
    model: Published = request.getfixturevalue("painter" if kind == "stable" else "sorter")
    engine, scheduler, words = model.engine, pair.pipeline.scheduler, WORDS if kind == "stable" else "7"
    condition, null = engine.text.encode([words]), engine.text.null(1)
    denoise = guided(denoiser(engine.denoiser, engine.prediction, engine.path), condition, null, 4.0)
    scheduler.set_timesteps(25)
    levels, z = engine.levels(25, 1.0), torch.randn(1, 4, 8, 8, generator=noise(5))
    for n in (0, 12, 23, 24):
        t = scheduler.timesteps[n]
        both = torch.cat([z, z])
        if kind == "stable":
            made = stable_states(pair.pipeline, [words, ""])
            out = pair.pipeline.unet(both, t, encoder_hidden_states=made).sample
        else:
            as_published(pair.pipeline.transformer, True)
            out = pair.pipeline.transformer(both, timestep=t.expand(2), class_labels=torch.tensor([7, 1000])).sample[:, :4]
        seen, unseen = out.chunk(2)
        yours = scheduler.step(unseen + 4.0 * (seen - unseen), t, z).prev_sample
        mine = SOLVERS["ddim"].solve(denoise, z[:, :, None], levels[n : n + 2], path=engine.path)[:, :, 0]
        torch.testing.assert_close(mine, yours, atol=1e-5, rtol=1e-5)


def stable_states(pipeline: Any, prompts: list[str]) -> Tensor:
    ids = pipeline.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return pipeline.text_encoder(ids)[0]


def test_token_states_are_those_of_transformers(stable: Pair, painter: Published) -> None:
    prompts = [WORDS, "", "lower " * 80]
    mine = painter.engine.text.encode(prompts)
    with torch.no_grad():
        torch.testing.assert_close(mine.states, stable_states(stable.pipeline, prompts), atol=1e-5, rtol=1e-5)
    assert mine.mask.all()
    assert [painter.engine.text.truncated(prompt) for prompt in prompts] == [False, False, True]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \t\n",
        WORDS,
        "THE tower's low, they'll've  said -- isn't it?!!",
        "café cafe\u0301 ÉÉ 日本語 один",
        "x² ⅷ 12,345 ½",
        "🔴🔵 a_b #tag @me http://x.y/z?q=1",
        "'s ''ll lower'lower",
        "a\u00a0b\u2003c\u200bd\u0085e",
        "<| end |>",
    ],
)
def test_texts_are_cut_as_transformers_cuts_them(stable: Pair, text: str) -> None:
    assert CLIPTokenizer.read(stable.folder / "tokenizer").encode(text) == stable.pipeline.tokenizer(text).input_ids


def test_any_string_has_ids(stable: Pair) -> None:
    tokenizer = CLIPTokenizer.read(stable.folder / "tokenizer")
    for text in ("\ud800", "\x00", "a" * 3000):
        ids = tokenizer.row(text, 77)
        assert (len(ids), ids[0], ids[-1]) == (77, tokenizer.start, tokenizer.end)
    assert tokenizer.encode("low" * 3)[1:-1] == tokenizer.encode("lowlowlow")[1:-1]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("steps", "offset"), [(2, 0), (3, 1), (50, 1), (999, 1)])
def test_levels_are_the_steps_that_diffusers_visits(spacing: Any, steps: int, offset: int) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(steps)
    path = VPLinear()
    levels = Chain(path, spacing=spacing, offset=offset).levels(steps)
    assert path.step_of_sigma(levels[:-1]).round().int().tolist() == scheduler.timesteps.tolist()
    assert levels[-1] == 0
    end = Chain(path, spacing=spacing, offset=offset, to_clean=False).levels(steps)
    # A chain that visits its first step has nowhere to go from it but to the end.
    assert float(path.step_of_sigma(end[-1])) == pytest.approx(-1 if scheduler.timesteps[-1] == 0 else 0)


def test_levels_stay_on_the_chain() -> None:
    chain = Chain(VPLinear(), offset=1)
    assert chain.levels(1000)[0] == 1
    with pytest.raises(UserError, match="at most 1000"):
        chain.levels(1001)
    with pytest.raises(UserError, match="cannot be shifted"):
        chain.levels(10, 3.0)


def test_other_predictions_and_solvers(stable: Pair, tmp_path: Path) -> None:
    """The same network taken to predict v: wrong for pictures, right for a comparison."""
    from diffusers import DDIMScheduler

    folder = shutil.copytree(stable.folder, tmp_path / "v")
    config = folder / "scheduler" / "scheduler_config.json"
    edit(config, prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=True)
    model = load_published(folder, device="cpu", dtype="float32")
    before = stable.pipeline.scheduler
    stable.pipeline.scheduler = DDIMScheduler.from_config(json.loads(config.read_text()))
    asked = {"num_inference_steps": 5, "guidance_scale": 2.0, "height": 16, "width": 16, "output_type": "pt"}
    yours = stable.pipeline(WORDS, latents=torch.randn(1, 4, 8, 8, generator=noise(0)), **asked).images
    stable.pipeline.scheduler = before
    mine = model.generate(WORDS, steps=5, guidance=2.0, solver="ddim")
    torch.testing.assert_close(pixels(mine), yours, atol=1e-5, rtol=0)
    made = {name: model.generate(WORDS, steps=3, solver=name).video.pixels for name in SOLVERS}
    assert all(not torch.equal(made["ddpm"], other) for name, other in made.items() if name != "ddpm")


# What every model promises


def test_a_picture_is_a_film_of_one_frame_and_says_how_it_was_made(sorter: Published, painter: Published) -> None:
    clip = sorter.generate("TENCH", seed=5, steps=2)
    assert clip.video.pixels.shape == (1, 3, 1, 16, 16)
    wanted = {"prompt": "TENCH", "text": "tench", "seed": 5, "size": [16, 16], "frames": 1, "steps": 2, "guidance": 4.0}
    wanted |= {"model": "dit", "kind": "DiTPipeline", "solver": "dpmpp_2m", "dtype": "float32", "device": "cpu"}
    assert wanted.items() <= clip.settings.items()
    assert json.loads(json.dumps(clip.settings)) == clip.settings
    assert sorter.generate("0", seed=5, steps=2).settings["text"] == "tench"
    assert sorter.generate("3", seed=5, steps=2).settings["text"] == "3"
    other = painter.generate(WORDS, size=(8, 24), steps=2, guidance=1.0)
    assert other.video.pixels.shape == (1, 3, 1, 8, 24)
    assert other.settings["guidance"] == 1.0
    assert painter.generate(WORDS, steps=2).settings["guidance"] == 7.5


@pytest.mark.parametrize(("kind", "prompts"), [("painter", [WORDS, "low", "tower"]), ("sorter", ["7", "tench", "999"])])
def test_a_batch_is_its_singles(kind: str, prompts: list[str], request: pytest.FixtureRequest) -> None:
    model: Published = request.getfixturevalue(kind)
    asked: dict[str, Any] = {"steps": 3, "solver": "ddpm"}
    together = model.generate_batch(prompts, [1, 2, 1], batch=2, **asked)
    for clip, prompt, seed in zip(together, prompts, (1, 2, 1), strict=True):
        alone = model.generate(prompt, seed=seed, **asked)
        assert alone.settings == clip.settings
        torch.testing.assert_close(alone.video.pixels, clip.video.pixels, atol=2e-5, rtol=0)
    assert (together[0].video.pixels - together[2].video.pixels).abs().max() > 1e-3, "words matter"
    with pytest.raises(UserError, match="one seed per prompt"):
        model.generate_batch(prompts, [1])


def test_half_precision_comes_close(stable: Pair, painter: Published) -> None:
    wide = painter.generate(WORDS, steps=3, guidance=1.5)
    half = load_published(stable.folder, device="cpu", dtype="bfloat16")
    assert next(half.engine.denoiser.parameters()).dtype == torch.bfloat16
    clip = half.generate(WORDS, steps=3, guidance=1.5)
    assert clip.settings["dtype"] == "bfloat16"
    gap = (clip.video.pixels - wide.video.pixels).abs()
    assert 0 < gap.mean() < 0.05


def test_nothing_of_a_picture_can_be_given(sorter: Published) -> None:
    clean, mask = torch.zeros(1, 4, 1, 8, 8), torch.ones(1, 1, 8, 8)
    half = mask.clone()
    half[..., :4] = 0
    for given, says in ((Given(clean, half), "words alone"), (Given(clean, mask, strength=0.5), "another path")):
        with pytest.raises(UserError, match=says):
            sorter.engine.sample([Request("7", 0)], (16, 16), 1, Sampling(steps=1), given=given)


def test_classes_have_names_and_numbers() -> None:
    text = ClassNames(600, {0: ["tench", "Tinca tinca"], 134: ["crane"], 517: ["crane"]})
    assert [text.number(said) for said in ("tench", " TINCA Tinca ", "5", "599")] == [0, 0, 5, 599]
    assert text.encode(["tench", "517"]).states.flatten().tolist() == [0, 517]
    assert text.null(2).states.flatten().tolist() == [600, 600]
    for said, says in (
        ("crane", "134 and 517 are both called"),
        ("tensh", "try 'tench'"),
        ("600", "0 to 599"),
        ("-1", "there is no class '-1'"),
        ("2.5", "or a number from 0 to 599"),
    ):
        with pytest.raises(UserError, match=says):
            text.number(said)
    with pytest.raises(UserError, match="does not name its classes"):
        ClassNames(5, {}).number("tench")


def test_older_folders_give_the_same_picture(stable: Pair, painter: Published, tmp_path: Path) -> None:
    """As Stable Diffusion 1 was published: names under `text_model.`, a counter, vocab.json and merges.txt, PNDM."""
    folder = shutil.copytree(stable.folder, tmp_path / "old")

    def older(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[f"text_model.{name}"] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    rewrite(folder / "text_encoder" / "model.safetensors", older)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    edit(folder / "tokenizer" / "tokenizer_config.json", pad_token={"content": "<|endoftext|>", "__type": "AddedToken"})
    config = folder / "scheduler" / "scheduler_config.json"
    edit(config, _class_name="PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=None)
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    again = load_published(folder, device="cpu", dtype="float32").generate(WORDS, steps=3)
    assert torch.equal(again.video.pixels, painter.generate(WORDS, steps=3).video.pixels)


def test_older_dit_folders_give_the_same_picture(dit: Pair, sorter: Published, tmp_path: Path) -> None:
    folder = shutil.copytree(dit.folder, tmp_path / "old")
    edit(folder / "transformer" / "config.json", _class_name="Transformer2DModel", cross_attention_dim=None, norm_eps=None)
    edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    rewrite(weights, lambda tensors: tensors.update({"pos_embed.pos_embed": sincos_plane(32, 4, 4)[None]}))
    again = load_published(folder, device="cpu", dtype="float32").generate("7", steps=3)
    assert torch.equal(again.video.pixels, sorter.generate("7", steps=3).video.pixels)
    rewrite(weights, lambda tensors: tensors.update({"pos_embed.pos_embed": sincos_plane(32, 4, 4)[None] + 1}))
    with pytest.raises(UserError, match="other positions"):
        load_published(folder)


@pytest.fixture
def published_file(sorter: Published, dit: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same DiT in one file with the authors' names, and its autoencoder beside it."""
    network = sorter.engine.denoiser.get_submodule("network")
    tensors = {"pos_embed": sincos_plane(32, 4, 4)[None]}
    for name, value in network.state_dict().items():
        for ours, theirs in PUBLISHED_NAMES:
            name = name.replace(ours, theirs)
        tensors[name] = value.clone()
    kernel = "x_embedder.proj.weight"
    tensors[kernel] = tensors[kernel].unflatten(1, (2, 2, 4)).permute(0, 3, 1, 2).contiguous()
    save_file(tensors, tmp_path / "DiT-tiny-2.safetensors")
    shutil.copytree(dit.folder / "vae", tmp_path / "vae")
    monkeypatch.setitem(layouts.SIZES, "tiny/2", DiTConfig(width=32, depth=2, heads=2))
    return tmp_path / "DiT-tiny-2.safetensors"


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@torch.no_grad()
def test_the_authors_file_is_sampled_as_they_do_it(published_file: Path, guidance: float) -> None:
    """Ancestral steps with the network's own variances, three channels guided: their sampler around diffusers' step."""
    from diffusers import DDPMScheduler

    model = load_published(published_file, device="cpu", dtype="float32")
    steps, rng = 6, torch.Generator().manual_seed(3)
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    visited = model.engine.path.step_of_sigma(model.engine.levels(steps, 1.0)[:-1]).round().int().tolist()  # type: ignore[attr-defined]
    scheduler.set_timesteps(timesteps=visited)
    network, z = model.engine.denoiser.get_submodule("network"), torch.randn(1, 4, 8, 8, generator=rng)
    for t in visited:
        out = network(torch.cat([z, z]), torch.tensor([t, t]), torch.tensor([7, 1000]))  # (2, 8, 8, 8)
        seen, unseen = out[:1], out[1:]
        led = unseen[:, :3] + guidance * (seen[:, :3] - unseen[:, :3])
        z = scheduler.step(torch.cat([led, seen[:, 3:]], 1), t, z, generator=rng).prev_sample
    mine = model.generate("7", seed=3, steps=steps, guidance=guidance, solver="ddpm").video.pixels[:, :, 0]
    theirs = model.engine.decode(z[:, :, None])[:, :, 0]
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def test_one_file_of_the_authors_is_the_same_network(published_file: Path, sorter: Published) -> None:
    model = load_published(published_file, device="cpu", dtype="float32")
    x, t, label = torch.randn(2, 4, 8, 8), torch.tensor([999.0, 3.0]), torch.tensor([7, 1000])
    one, other = (m.engine.denoiser.get_submodule("network")(x, t, label) for m in (model, sorter))
    assert torch.equal(one, other)
    assert (model.name, model.size) == ("DiT-tiny-2", (16, 16))
    visited = model.engine.path.step_of_sigma(model.engine.levels(250, 1.0)[:-1]).round().int().tolist()  # type: ignore[attr-defined]
    assert (visited[:3], visited[-3:], len(visited)) == ([999, 995, 991], [8, 4, 0], 250)
    clip = model.generate("7", steps=2)
    assert clip.settings["model"] == "DiT-tiny-2"
    assert (model.engine.guided_channels, sorter.engine.guided_channels) == (3, None)
    with pytest.raises(UserError, match="does not name its classes"):
        model.generate("cock")


def test_a_wrong_file_is_one_sentence(published_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = published_file.read_bytes()
    monkeypatch.delitem(layouts.SIZES, "tiny/2")
    refused(published_file, "its number of heads is unknown")
    published_file.write_bytes(good[:-50])
    refused(published_file, "truncated or corrupt")
    save_file({"a": torch.zeros(1)}, published_file)
    refused(published_file, "names of a published DiT")
    shutil.rmtree(published_file.parent / "vae")
    refused(published_file, "put the folder vae")
    for name in ("DiT-XL-2-256x256.pt", "v1-5.ckpt", "pytorch_model.bin"):
        (published_file.parent / name).write_bytes(b"")
        refused(published_file.parent / name, "convert it to safetensors")
    (published_file.parent / "env.sh").write_text("true")
    refused(published_file.parent / "env.sh", "env.sh is no checkpoint")
    refused(published_file.parent / "nowhere", "there is no model")


# What is wrong with a folder


def refused(path: Path, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        load_published(path, device="cpu", dtype="float32")
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "a sentence that ends with the remedy"


UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
VAE, DIT = "vae/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("harm", ["truncated", "missing", "pickled", "split", "renamed", "nan", "other names", "other shapes"])
@pytest.mark.parametrize(("kind", "file"), [("stable", UNET), ("stable", TEXT), ("stable", VAE), ("dit", DIT)])
def test_harmed_weights_are_found(kind: str, file: str, harm: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = shutil.copytree(request.getfixturevalue(kind).folder, tmp_path / "harmed")
    path = folder / file
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
        refused(folder, f"{path.name} is truncated or corrupt")
    elif harm == "missing":
        path.unlink()
        refused(folder, f"{path.name} is missing")
    elif harm == "pickled":
        path.rename(path.with_suffix(".bin"))
        refused(folder, "is a pickle, which is never opened here; convert it to safetensors")
    elif harm == "split":
        path.unlink()
        path.with_name(f"{path.name}.index.json").write_text("{}")
        refused(folder, "several files")
    elif harm == "renamed":
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
        refused(folder, "rename it")
    elif harm == "nan":
        rewrite(path, lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(float("nan")))
        refused(folder, "not finite")
    elif harm == "other names":
        rewrite(path, lambda tensors: tensors.update({"wings": tensors.popitem()[1]}))
        refused(folder, r"missing \['.*unknown \['wings'")
    else:
        rewrite(path, lambda tensors: tensors.update({name: value[:-1].clone() for name, value in tensors.items()}))
        refused(folder, r"wrong shape \['|embedder of its own")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_parts_are_found(stable: Pair, tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(stable.folder, tmp_path / "lacking")
    for file in (folder / part).glob("*.json"):
        good = file.read_bytes()
        for bad in [b"{", b"[]"] if file.name != "tokenizer_config.json" else [b"{"]:
            file.write_bytes(bad)
            refused(folder, f"{part}")
        file.write_bytes(good)
    for file in (folder / part).iterdir():
        file.unlink()
    refused(folder, part)
    (folder / part).rmdir()
    refused(folder, f"has no folder {part}")
    edit(folder / "model_index.json", **{part: [None, None]})
    refused(folder, f"names no {part}")


CONFIG = "config.json"


@pytest.mark.parametrize(
    ("kind", "file", "changes", "says"),
    [
        ("stable", "model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "DiTPipeline, StableDiffusionPipeline"),
        ("stable", "model_index.json", {"_class_name": None}, "does not say"),
        (
            "stable",
            "model_index.json",
            {"unet": ["diffusers", "UNet3DConditionModel"]},
            "has a UNet3DConditionModel as its unet",
        ),
        ("stable", "model_index.json", {"vae": ["diffusers", "VQModel"]}, "has a VQModel as its vae"),
        ("stable", "model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "T5EncoderModel"),
        ("dit", "model_index.json", {"transformer": ["diffusers", "PixArtTransformer2DModel"]}, "PixArtTransformer2DModel"),
        ("dit", "model_index.json", {"id2label": {"1000": "unicorn"}}, "names class 1000, the model has 1000"),
        ("dit", "model_index.json", {"id2label": {"x": "unicorn"}}, "must map class numbers"),
        ("stable", "scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEuler"),
        ("stable", "scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "betas 'sigmoid'; only linear"),
        ("stable", "scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ("stable", "scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("stable", "scheduler/scheduler_config.json", {"clip_sample": True}, "clip_sample"),
        ("dit", "scheduler/scheduler_config.json", {"clip_sample": None}, "clip_sample"),  # the default there
        ("stable", "scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "flow_prediction"),
        ("stable", "scheduler/scheduler_config.json", {"timestep_spacing": "karras"}, "karras"),
        ("stable", "scheduler/scheduler_config.json", {"beta_end": "0.02"}, "beta_end"),
        ("stable", "scheduler/scheduler_config.json", {"beta_start": 0.5}, "no chain can have"),
        ("stable", "unet/config.json", {"_class_name": "UNet2DModel"}, "UNet2DConditionModel"),
        ("stable", "unet/config.json", {"in_channels": 9}, "takes 9 channels and gives 4"),
        ("stable", "unet/config.json", {"in_channels": 8, "out_channels": 8}, "does not fit|latent channels"),
        ("stable", "unet/config.json", {"attention_head_dim": [5, 10]}, "heads must be int"),
        ("stable", "unet/config.json", {"attention_head_dim": 7}, "7 heads"),
        ("stable", "unet/config.json", {"use_linear_projection": True}, "use_linear_projection"),
        ("stable", "unet/config.json", {"norm_eps": 1e-6}, "norm_eps"),
        ("stable", "unet/config.json", {"wings": "two"}, "wings"),
        ("stable", "unet/config.json", {"sample_size": None}, "lacks sample_size"),
        ("stable", "unet/config.json", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "another kind"),
        ("stable", "unet/config.json", {"block_out_channels": [16, 24]}, "another kind"),
        ("stable", "unet/config.json", {"cross_attention_dim": 32}, "does not fit"),
        ("stable", "text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act to 'gelu'"),
        ("stable", "text_encoder/config.json", {"model_type": "t5"}, "describes a t5"),
        ("stable", "text_encoder/config.json", {"num_attention_heads": 5}, "5 heads"),
        ("stable", "text_encoder/config.json", {"vocab_size": 20}, "from one model"),
        ("stable", "tokenizer/tokenizer.json", {"model": {"vocab": {"a": 0}, "merges": []}}, "has no <|startoftext|>"),
        ("stable", "tokenizer/tokenizer.json", {"model": {"vocab": vocabulary(), "merges": ["a b"]}}, "not in its vocabulary"),
        (
            "stable",
            "tokenizer/tokenizer.json",
            {"model": {"vocab": vocabulary(), "merges": [[1, 2]]}},
            "no vocabulary and merges",
        ),
        ("stable", "vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
        ("dit", "transformer/config.json", {"norm_type": "ada_norm"}, "norm_type"),
        ("dit", "transformer/config.json", {"out_channels": 5}, "gives 5 channels"),
        ("dit", "transformer/config.json", {"num_layers": 3}, "does not fit"),
        ("dit", "transformer/config.json", {"num_layers": None}, "needs num_layers"),
        ("dit", "transformer/config.json", {"attention_head_dim": 15}, "width"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(
    kind: str, file: str, changes: dict[str, Any], says: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = shutil.copytree(request.getfixturevalue(kind).folder, tmp_path / "changed")
    edit(folder / file, **changes)
    refused(folder, says.replace("|>", r"\|>").replace("<|", r"<\|"))


def test_parts_of_two_checkpoints_are_refused(stable: Pair, dit: Pair, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    wide = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=6, **kinds)
    folder = shutil.copytree(dit.folder, tmp_path / "mixed")
    wide.save_pretrained(folder / "vae")
    refused(folder, "takes 4 latent channels, its vae makes 6")
    own = shutil.copytree(dit.folder, tmp_path / "own")
    rewrite(own / DIT, lambda tensors: tensors["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"].add_(1))
    refused(own, "an embedder of its own in every block")
    refused(stable.folder / "unet", "holds no model_index.json")
    assert read_chain(stable.folder / "scheduler").to_clean is False


# The command line


@pytest.fixture
def tubelet(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    from tubelet.cli import main

    def run(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    return run


def test_words_in_picture_out(tubelet, stable: Pair, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{name}.png" for name in ("first", "second", "third"))
    asked = ("generate", WORDS, "--model", stable.folder, "--steps", 3, "--guidance", 2, "--solver", "ddim", "--size", "16x8")
    code, out, err = tubelet(*asked, "--seed", 4, "--out", first, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert set(answer["timings"]) == {"start", "text", "denoise", "decode", "write", "total"}
    wanted = {"model": "stable", "solver": "ddim", "steps": 3, "guidance": 2.0, "seed": 4, "size": [16, 8], "prompt": WORDS}
    assert wanted.items() <= answer["settings"].items()
    assert read_settings(first) == answer["settings"]
    assert tubelet(*asked, "--seed", 4, "--out", second)[0] == 0
    assert tubelet(*asked, "--seed", 5, "--out", third)[0] == 0
    assert first.read_bytes() == second.read_bytes() != third.read_bytes()
    code, _, err = tubelet("generate", "--like", first, "--out", second)
    assert (code, err.count("\n")) == (2, 1)
    assert "made with --model 'stable'" in err


def test_class_in_picture_out(tubelet, dit: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = tubelet("generate", "0", "--model", dit.folder, "--steps", 1)
    assert (code, err) == (0, "")
    assert "read as: tench" in out
    assert read_settings(tmp_path / "out" / "picture.png")["text"] == "tench"


def test_an_end_that_is_not_read_is_said(tubelet, stable: Pair, tmp_path: Path) -> None:
    code, _, err = tubelet("generate", "low " * 90, "--model", stable.folder, "--steps", 1, "--out", tmp_path / "a.png")
    assert code == 0
    assert "more words than the model reads" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("7", "--frames", 3), "does not go with --frames"),
        (("7", "--loop"), "does not go with --loop"),
        (("7", "--window", "9"), "does not go with --window"),
        (("7", "--first", "a.png"), "does not go with --first"),
        (("7", "--last", "a.png"), "does not go with --last"),
        (("7", "--refine-from", "a.mp4"), "does not go with --refine-from"),
        (("7", "--strength", 0.5), "does not go with --strength"),
        (("7", "--like", "a.png"), "does not go with --like"),
        (("7", "--system", "worlds-64"), "does not go with --system"),
        ((), "words are needed"),
        (("tensh",), "there is no class 'tensh'; try 'tench'"),
        (("crane",), "give the number of one"),
        (("1000",), "numbered 0 to 999"),
        (("7", "--size", "16x18"), "width must be a positive multiple of 4, got 18: try 16 or 20"),
        (("7", "--size", "big"), "must look like"),
        (("7", "--steps", 0), "steps must be between"),
        (("7", "--solver", "magic"), "there is no solver 'magic'; choose one of euler"),
        (("7", "--guidance", -1), "guidance must be between"),
        (("7", "--seed", -1), "a seed is a whole number"),
        (("7", "--out", "a.jpg"), "must end in .mp4"),
    ],
)
def test_a_wrong_wish_is_one_sentence(
    tubelet, dit: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = tubelet("generate", *words, "--model", dit.folder)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert says in err
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_a_bad_folder_is_exit_code_2(tubelet, stable: Pair, tmp_path: Path) -> None:
    code, out, err = tubelet("generate", "low", "--model", stable.folder / "unet", "--out", tmp_path / "a.png")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "holds no model_index.json" in err
    code, _, err = tubelet("generate", "low", "--solver", "ddim", "--refine-from", "a.mp4", "--out", tmp_path / "a.png")
    assert (code, "leave it out" in err) == (2, True)
    assert not list(tmp_path.iterdir())
