"""The engine with tiny random networks: batches equal singles, seeds, cancelling, and every wrong wish."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from tubelet.codecs import build_codec
from tubelet.core.errors import UserError
from tubelet.diffusion.solvers import SOLVERS
from tubelet.generate.engine import Cancelled, Engine, Request, Sampling
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.nn.patch import token_grid
from tubelet.tasks.edit import edit
from tubelet.tasks.given import Given
from tubelet.tasks.timeline import place
from tubelet.text.own import OwnTextConfig, OwnTextEncoder

TINY = SpacetimeConfig(width=32, depth=2, heads=2, in_channels=4, patch=(2, 2, 2), text_width=32)
CODEC = {"channels": 4, "fine_width": 16, "coarse_width": 16, "temporal_stride": 2, "decoder_blocks": [1, 1, 1]}


def parts(stride: int = 2) -> tuple:
    """Networks with every weight random, so that prompt, noise and guidance all matter."""
    torch.manual_seed(0)
    codec, denoiser = build_codec("causal_conv", CODEC | {"temporal_stride": stride}).eval(), Spacetime(TINY).eval()
    text = OwnTextEncoder(OwnTextConfig(vocab_size=300, width=32, depth=1, heads=2)).eval()
    for parameter in denoiser.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return codec, denoiser, text


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(*parts(), patch=TINY.patch)


def films(
    engine: Engine, *requests: Request, size=(32, 48), frames=9, sampling: Sampling | None = None, **more
) -> torch.Tensor:
    return engine.sample(requests, size, frames, sampling or Sampling(steps=3), **more)[0]


RED, BLUE = Request("a red ball bounces", 3), Request("a very large blue triangle slides to the left", 4)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_a_batch_is_its_singles(engine: Engine, solver: str) -> None:
    sampling = Sampling(steps=3, solver=solver, interval=(0.1, 0.9))
    together = films(engine, RED, BLUE, Request("a red ball bounces", 5), sampling=sampling)
    assert together.shape == (3, 3, 9, 32, 48)
    for number, request in enumerate((RED, BLUE, Request("a red ball bounces", 5))):
        alone = films(engine, request, sampling=sampling)
        torch.testing.assert_close(together[number : number + 1], alone, rtol=0, atol=2e-5)
    chunked = films(engine, RED, BLUE, Request("a red ball bounces", 5), sampling=sampling, batch=2)
    torch.testing.assert_close(chunked, together, rtol=0, atol=2e-5)


def test_the_same_again_is_bitwise_the_same(engine: Engine) -> None:
    assert torch.equal(films(engine, RED), films(engine, RED))


def test_without_guidance_at_all_the_prompt_says_nothing(engine: Engine) -> None:
    """Guided by 0 a film is of no words, whichever are given."""
    sampling = Sampling(steps=3, guidance=0.0)
    red, blue = (films(engine, Request(words, 3), sampling=sampling) for words in ("a red ball bounces", "the blue ring falls"))
    assert torch.equal(red, blue)
    assert not torch.equal(red, films(engine, RED, sampling=Sampling(steps=3, guidance=1.0)))


def test_prompt_seed_guidance_and_steps_matter(engine: Engine) -> None:
    base = films(engine, RED)
    for other in (
        films(engine, Request(RED.text, 99)),
        films(engine, Request("a blue box", RED.seed)),
        films(engine, RED, sampling=Sampling(steps=3, guidance=1.0)),
        films(engine, RED, sampling=Sampling(steps=3, interval=(0.0, 0.5))),
        films(engine, RED, sampling=Sampling(steps=4)),
        films(engine, RED, sampling=Sampling(steps=3, shift=3.0)),
        films(engine, RED, sampling=Sampling(steps=3, solver="heun")),
    ):
        assert float((other - base).abs().max()) > 1e-3


def test_the_shift_grows_with_the_root_of_the_token_count(engine: Engine) -> None:
    count = math.prod(token_grid(engine.codec.strides.latent_shape(9, 32, 48), TINY.patch))
    grown = films(engine, RED, sampling=Sampling(steps=3, shift=2.0, tokens=1))
    assert torch.equal(grown, films(engine, RED, sampling=Sampling(steps=3, shift=2.0 * math.sqrt(count))))
    same = films(engine, RED, sampling=Sampling(steps=3, shift=2.0, tokens=count))
    assert torch.equal(same, films(engine, RED, sampling=Sampling(steps=3, shift=2.0)))
    assert not torch.equal(same, grown)


def test_the_output_is_a_film_and_the_seconds_add_up(engine: Engine) -> None:
    pixels, timings = engine.sample([RED], (16, 16), 1, Sampling(steps=2))
    assert pixels.shape == (1, 3, 1, 16, 16)
    assert pixels.dtype == torch.float32
    assert float(pixels.abs().max()) <= 1
    assert set(timings) == {"text", "denoise", "decode"}
    assert all(seconds > 0 for seconds in timings.values())


def test_progress_counts_all_steps_and_can_cancel(engine: Engine) -> None:
    seen: list[tuple[int, int]] = []
    films(engine, RED, BLUE, sampling=Sampling(steps=2), batch=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    calls = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        films(engine, RED, sampling=Sampling(steps=9), progress=stop)
    assert calls == [1, 2]


def test_global_randomness_is_neither_used_nor_moved(engine: Engine) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = films(engine, RED, sampling=Sampling(steps=2, solver="ddpm"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(films(engine, RED, sampling=Sampling(steps=2, solver="ddpm")), first)


@pytest.mark.parametrize(
    ("size", "frames", "says"),
    [
        ((32, 40), 9, "width must be a positive multiple of 16, got 40: try 32 or 48"),
        ((8, 32), 9, "height"),
        ((0, 32), 9, "height"),
        ((-16, 32), 9, "height"),
        ((32, 32), 0, "frames"),
        ((32, 32), -3, "frames"),
        ((32, 32), 7, "frames must be 1 . a multiple of 4, got 7: try 5 or 9"),
        ((32.0, 32), 9, "whole number"),
    ],
)
def test_a_size_that_does_not_divide_is_refused(engine: Engine, size, frames, says) -> None:
    with pytest.raises(UserError, match=says):
        films(engine, RED, size=size, frames=frames)


def test_wrong_settings_are_refused(engine: Engine) -> None:
    for wrong, says in (
        ({"steps": 0}, "steps"),
        ({"steps": 100_000}, "steps"),
        ({"guidance": -1.0}, "guidance"),
        ({"guidance": 1e9}, "guidance"),
        ({"guidance": float("nan")}, "guidance"),
        ({"solver": "magic"}, "dpmpp_2m"),
        ({"interval": (0.8, 0.2)}, "interval"),
        ({"interval": (0.0, 2.0)}, "interval"),
        ({"shift": 0.0}, "shift"),
        ({"shift": float("inf")}, "shift"),
        ({"eta": -0.1}, "eta"),
        ({"eta": float("nan")}, "eta"),
        ({"tokens": -5}, "tokens"),
        ({"eta_above": 1.5}, "eta_above"),
        ({"eta_above": float("nan")}, "eta_above"),
    ):
        with pytest.raises(UserError, match=says):
            Sampling(**wrong)
    for prompt, seed, says in (
        ("", 0, "empty"),
        (" \n", 0, "empty"),
        ("\u200b\ufeff", 0, "empty"),
        ("ball", -1, "seed"),
        ("ball", 2**63, "seed"),
        ("ball", 1.5, "seed"),
    ):
        with pytest.raises(UserError, match=says):
            Request(prompt, seed)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="nothing"):
        films(engine)
    with pytest.raises(UserError, match="batch"):
        films(engine, RED, batch=0)


def test_a_solver_gets_its_options_and_no_other_one_does(engine: Engine) -> None:
    made = {
        (solver, eta, above): films(engine, RED, sampling=Sampling(steps=4, solver=solver, eta=eta, eta_above=above))
        for solver in ("dpmpp_2m", "dpmpp_2m_sde")
        for eta, above in ((0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (3.0, 0.5))
    }
    flow = made["dpmpp_2m", 0.0, 0.0]
    equal = [key for key, film in made.items() if torch.equal(film, flow)]
    assert equal == [*(key for key in made if key[0] == "dpmpp_2m"), ("dpmpp_2m_sde", 0.0, 0.0)]
    drawn = [film for key, film in made.items() if key not in equal]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(drawn, 2))


def test_values_that_stop_being_finite_are_found() -> None:
    codec, denoiser, text = parts()
    denoiser.head.bias.data[0] = float("inf")
    with pytest.raises(UserError, match="stopped being finite"):
        films(Engine(codec, denoiser, text, patch=TINY.patch), RED)
    codec, denoiser, text = parts()
    next(iter(codec.parameters())).data.fill_(1.0)
    for parameter in codec.parameters():
        parameter.data[:] = float("nan")
    with pytest.raises(UserError, match="pixels are not finite"):
        films(Engine(codec, denoiser, text, patch=TINY.patch), RED)


def test_bf16_weights_stay_close_to_fp32(engine: Engine) -> None:
    codec, denoiser, text = (module.to(torch.bfloat16) for module in parts())
    narrow = films(Engine(codec, denoiser, text, patch=TINY.patch), RED)
    assert narrow.dtype == torch.float32
    assert float((narrow - films(engine, RED)).abs().mean()) < 0.05


def test_plain_velocity_prediction_works_too() -> None:
    other = dataclasses.replace(Engine(*parts(), patch=TINY.patch), prediction="velocity")
    assert films(other, RED).isfinite().all()


def known(engine: Engine, frames: int, seed: int = 8) -> torch.Tensor:
    shape = engine.latent_shape((32, 48), frames)
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def extended(past: torch.Tensor, frames: int) -> Given:
    """A film of `frames` latent frames that begins with `past`."""
    return place([(0, past)], frames).given(range(frames))


def test_what_is_given_comes_out_as_the_codec_has_it(engine: Engine) -> None:
    """Patches span two latent frames, the first one alone: what is given covers whole patches."""
    past = known(engine, 5)
    film = films(engine, RED, BLUE, given=extended(past, 5))
    alone = engine.codec.decode(past).clamp(-1, 1)
    torch.testing.assert_close(film[:, :, :5], alone.expand(2, -1, -1, -1, -1), atol=1e-5, rtol=0)
    assert float((film[0, :, 5:] - film[1, :, 5:]).abs().max()) > 1e-3, "the words decide the rest"
    one = films(engine, BLUE, given=extended(past, 5))
    torch.testing.assert_close(film[1:], one, atol=2e-5, rtol=0)
    assert float((film - films(engine, RED, BLUE)).abs().max()) > 1e-3


@torch.no_grad()
def test_an_edit_stays_near_the_film_when_it_is_weak(engine: Engine) -> None:
    clean = known(engine, 9)
    original = engine.codec.decode(clean).clamp(-1, 1)
    gaps = [float((films(engine, RED, given=edit(clean, s)) - original).abs().mean()) for s in (0.05, 0.95)]
    assert gaps[0] < 0.5 * gaps[1]


def test_given_films_of_another_size_are_refused(engine: Engine) -> None:
    with pytest.raises(UserError, match="make it fit"):
        films(engine, RED, given=extended(known(engine, 5), 6))
    with pytest.raises(UserError, match="make it fit"):
        films(engine, RED, RED, RED, given=extended(known(engine, 5).expand(2, -1, -1, -1, -1), 5))


def by_frame(stride: int = 2) -> Engine:
    """An engine whose tokens span one latent frame, of `stride` frames."""
    config = dataclasses.replace(TINY, patch=(1, 2, 2))
    codec, _, text = parts(stride)
    torch.manual_seed(1)
    denoiser = Spacetime(config).eval()
    for parameter in denoiser.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return Engine(codec, denoiser, text, patch=config.patch)


def test_frames_may_have_times_of_their_own(engine: Engine) -> None:
    one = by_frame()
    shape = one.latent_shape((32, 32), 9)
    past = torch.randn(1, shape[0], 2, *shape[2:], generator=torch.Generator().manual_seed(3))
    line = place([(0, past)], shape[1])

    def made(times: tuple[int, ...] | None) -> torch.Tensor:
        return one.denoise([RED], shape, Sampling(steps=2), given=line.given(range(shape[1]), times=times))

    in_order, usual = made(tuple(range(shape[1]))), made(None)
    assert torch.equal(in_order, usual)
    apart = made((0, *range(6, 5 + shape[1])))
    assert torch.equal(apart[:, :, :2], past)
    assert float((apart - usual)[:, :, 2:].abs().max()) > 1e-3
    wide = engine.latent_shape((32, 32), 17)
    given = place([(0, torch.zeros(1, wide[0], 1, *wide[2:]))], wide[1]).given(range(wide[1]), times=tuple(range(wide[1])))
    with pytest.raises(UserError, match="whose tokens span one frame"):
        engine.denoise([RED], wide, Sampling(steps=1), given=given)


def test_loops_of_a_batch_are_its_singles() -> None:
    engine = by_frame(stride=1)
    together = films(engine, RED, BLUE, loop=True)
    torch.testing.assert_close(together[1:], films(engine, BLUE, loop=True), atol=2e-5, rtol=0)
    assert float((together[1:] - films(engine, BLUE)).abs().max()) > 1e-3


def test_what_does_not_fit_into_memory_is_one_sentence(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes")

    pixels = torch.zeros(1, 3, 9, 32, 48)
    for name, call in {
        "encode": lambda: engine.encode(pixels),
        "decode": lambda: engine.decode(torch.zeros(1, 4, 5, 4, 6)),
    }.items():
        monkeypatch.setattr(engine.codec, name, full)
        with pytest.raises(UserError, match="1 x 9 frames of 32x48 do not fit into memory"):
            call()
