"""Known cells come out as they went in, what is to be made is made, and every task says the same in one form."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.core.types import Strides
from tubelet.diffusion.paths import RECTIFIED_FLOW, uniform_sigmas
from tubelet.diffusion.solvers import SOLVERS
from tubelet.tasks.edit import blend, edit, resized
from tubelet.tasks.given import Given, conditioned
from tubelet.tasks.loop import cyclic
from tubelet.tasks.masks import MASKS, check_shares, draw_name
from tubelet.tasks.region import around, box, cells, inpaint, put_back
from tubelet.tasks.timeline import Span, Timeline, Window, place, plan


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, frames, 4, 4, generator=rng(seed))


TASKS = {
    "image": lambda: place([(0, clip(1))], 5).given(range(5)),
    "between": lambda: place([(0, clip(1)), (4, clip(1, 1))], 5).given(range(5)),
    "extend": lambda: place([(0, clip(3))], 5).given(range(5)),
    "extend_hazy": lambda: place([(0, clip(3))], 5).given(range(5), haze=0.1),
    "backward": lambda: place([(3, clip(2))], 5).given(range(5)),
    "connect": lambda: place([(0, clip(2)), (4, clip(1, 1))], 5).given(range(5)),
    "box": lambda: inpaint(clip(5), box((5, 4, 4), 0, 1, 2, 3)[None].expand(2, -1, -1, -1), Strides(1, 1, 1)),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler", "heun"])
def test_known_cells_come_out_as_they_went_in(name: str, solver: str) -> None:
    given = TASKS[name]()
    assert given.clean.shape == (2, 3, 5, 4, 4)
    noise = torch.randn(given.clean.shape, generator=rng(9))
    seen: list[tuple[Tensor, Tensor]] = []

    def denoise(z: Tensor, sigma: Tensor) -> Tensor:
        seen.append((z, sigma))
        return z * 0.5 + 1

    sigmas = uniform_sigmas(4)
    film = SOLVERS[solver].solve(conditioned(denoise, given, noise), given.start(noise), sigmas, path=RECTIFIED_FLOW)
    known = (given.mask == 0)[:, None].expand_as(film)
    assert known.any()
    torch.testing.assert_close(film[known], given.clean[known], atol=1e-6, rtol=0)
    assert not torch.allclose(film[~known], noise[~known])
    for z, sigma in seen:
        assert sigma.shape == (given.mask.shape if name == "box" else given.mask.shape[:2]), "a level per frame if it can be"
        level = min(given.haze, float(sigma.max()))
        known_levels = sigma[given.mask == 0] if name == "box" else sigma[given.mask[:, :, 0, 0] == 0]
        torch.testing.assert_close(known_levels.unique(), torch.tensor([level], dtype=sigma.dtype))
        shown = (1 - level) * given.clean + level * noise
        torch.testing.assert_close(z[known].float(), shown[known], atol=1e-6, rtol=0)


def test_parts_stand_where_they_belong() -> None:
    a, b = clip(2), clip(1, 1)
    line = place([(0, a), (4, b)], 5)
    assert line.known == (True, True, False, False, True)
    assert torch.equal(line.clean[:, :, :2], a)
    assert torch.equal(line.clean[:, :, 4:], b)
    seen = line.given([0, 3, 4], times=(0, 5, 6))
    assert seen.mask[0, :, 0, 0].tolist() == [0, 1, 0]
    assert torch.equal(seen.clean[:, :, 2:], b)
    assert seen.times == (0, 5, 6)


def test_nothing_to_make_or_other_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="nothing is left to make"):
        place([(0, clip(5))], 5)
    with pytest.raises(UserError, match="has no room"):
        place([(0, clip(2)), (1, clip(1))], 5)
    with pytest.raises(UserError, match="has no room"):
        place([(4, clip(2))], 5)
    with pytest.raises(UserError, match="of one size"):
        place([(0, clip(1)), (2, clip(1)[..., :2])], 5)
    with pytest.raises(UserError, match="must be finite"):
        place([(0, clip(1) * float("nan"))], 3).given(range(3))
    with pytest.raises(UserError, match="mask \\(B, T, H, W\\)"):
        Given(clip(2), torch.ones(2, 2, 4, 3))
    with pytest.raises(UserError, match="strength must be above 0"):
        edit(clip(2), 0.0)
    with pytest.raises(UserError, match="one time per frame"):
        Given(clip(2), torch.ones(2, 2, 4, 4), times=(0, 1, 2))


def test_an_edit_starts_between_the_film_and_noise() -> None:
    film, noise = clip(3), clip(3, 5)
    torch.testing.assert_close(edit(film, 0.25).start(noise), 0.75 * film + 0.25 * noise)
    mixed = blend(film, noise, 0.5).clean
    assert torch.equal(mixed[:, :, 0], film[:, :, 0])
    assert torch.equal(mixed[:, :, -1], noise[:, :, -1])
    with pytest.raises(UserError, match="one size"):
        blend(film, clip(2), 0.5)


def test_a_loop_is_the_same_film_wherever_it_is_cut() -> None:
    """A network that smooths along time with zero ends leaves a seam; in a film that goes on it has none."""

    def smooth(z: Tensor, sigma: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(z, (0, 0, 0, 0, 1, 1))
        return (padded[:, :, :-2] + padded[:, :, 1:-1] + padded[:, :, 2:]) / 3

    flat = torch.ones(1, 1, 8, 1, 1)
    sigma = torch.tensor(0.5)
    once = smooth(flat, sigma)[0, 0, :, 0, 0]
    assert once[0] < 0.7 < once[3]
    turned = cyclic(smooth, 8, [rng()])
    for _ in range(20):
        assert torch.equal(turned(flat, sigma), flat), "in no call, not on the mean of them"
    for count in (1, 2, 3, 8):
        seen: list[tuple[Tensor, Tensor]] = []
        film = torch.arange(float(count)).view(1, 1, count, 1, 1)
        for level in (film[:, 0, :, 0, 0], film[:, 0]):  # by frame, by cell
            again = cyclic(lambda z, s, seen=seen: seen.append((z, s)) or z, count, [rng()])(film, level)
            assert torch.equal(again, film)
            z, shown = seen.pop()
            more = min(4, count - 1)
            assert z.shape[2] == count + 2 * more
            order = z[0, 0, :, 0, 0]
            assert ((order.diff() - 1) % count == 0).all(), "one follows the other, over the ends too"
            assert torch.equal(shown.reshape(-1), order), "each frame at its own level"
    frames = torch.arange(8.0).view(1, 1, 8, 1, 1)
    two = torch.cat([frames, frames + 1])
    assert torch.equal(cyclic(lambda z, s: z, 8, [rng(1), rng(2)])(two, sigma), two)
    one = torch.full((1, 8), 0.5)  # levels of one known film for both
    assert torch.equal(cyclic(lambda z, s: z * s[:, None, :, None, None], 8, [rng(1), rng(2)])(two, one), two / 2)
    both: list[Tensor] = []
    cyclic(lambda z, s: both.append(z) or z, 8, [rng(1), rng(2)])(two, sigma)
    alone: list[Tensor] = []
    cyclic(lambda z, s: alone.append(z) or z, 8, [rng(2)])(two[1:], sigma)
    assert torch.equal(both[0][1:], alone[0]), "a batch of two is two singles"


def flags(text: str) -> list[bool]:
    """`kk..` as known flags."""
    return [letter == "k" for letter in text]


def filled(known: str, spans: list[Span], window: int, overlap: int, sink: int = 0) -> list[Window]:
    """The plan, after checking that it makes every frame once, from known ones, in windows that are not too long."""
    have, out = flags(known), plan(flags(known), spans, window, overlap, sink)
    for number, one in enumerate(out):
        assert len(one.frames) <= window
        assert list(one.frames) == sorted(set(one.frames))
        fresh = [frame for frame in one.frames if not have[frame]]
        assert fresh, "a window makes something"
        assert number == 0 or any(have[frame] for frame in one.frames) or spans[one.span].cut
        for frame in fresh:
            have[frame] = True
    assert all(have)
    return out


def test_windows_cover_a_film_and_look_back() -> None:
    whole = filled("." * 170, [Span(0, 170)], 17, 2)
    assert whole[0].frames == tuple(range(17))
    for before, after in itertools.pairwise(whole[:-1]):
        assert after.frames[0] == before.frames[-1] - 1, "two frames of overlap"
    assert whole[-1].frames == tuple(range(153, 170)), "the last one is as long as the others and looks back further"
    assert [w.frames for w in filled("." * 5, [Span(0, 5)], 17, 2)] == [tuple(range(5))]
    assert [w.frames for w in filled("k...k", [Span(0, 5)], 5, 2)] == [(0, 1, 2, 3, 4)]
    with pytest.raises(UserError, match="cannot look back on 4"):
        plan(flags("....."), [Span(0, 5)], 4, 4)


def test_an_extension_sees_as_much_of_the_past_as_there_is_room_for() -> None:
    assert [w.frames for w in filled("k" * 20 + "." * 8, [Span(20, 28)], 17, 2)] == [tuple(range(11, 28))]
    backward = filled("." * 8 + "k" * 20, [Span(0, 8)], 17, 2)
    assert [w.frames for w in backward] == [tuple(range(17))]
    far = filled("." * 30 + "k" * 4, [Span(0, 30)], 17, 2)
    assert far[0].frames == tuple(range(15, 32)), "far back, it is made from its end on"
    assert far[-1].frames[0] == 0


def test_a_connection_arrives_at_what_comes_after() -> None:
    assert [w.frames for w in filled("kkkk....kkkk", [Span(4, 8)], 12, 2)] == [tuple(range(12))]
    long = filled("kkkk" + "." * 20 + "kkkk", [Span(4, 24)], 10, 2)
    assert long[-1].frames[-1] >= 24
    one = filled("kkk" + "." * 9 + "kkkkk", [Span(3, 12)], 17, 5)
    assert [w.frames for w in one] == [tuple(range(17))], "what a window holds is made at once"
    halves = filled("k" * 20 + "." * 12 + "k" * 20, [Span(20, 32)], 17, 5)
    assert [w.frames for w in halves] == [tuple(range(9, 26)), tuple(range(21, 38))], "six frames each"


@pytest.mark.parametrize("overlap", [1, 2, 5, 15, 16])
@pytest.mark.parametrize("behind", [1, 3, 20])
@pytest.mark.parametrize("before", [0, 1, 20])
def test_whatever_the_length_the_last_window_sees_what_it_arrives_at(before: int, behind: int, overlap: int) -> None:
    """Pictures that end a shot lie in its span, clips that follow behind it."""
    for length in range(1, 60):
        for inside in (0, behind):
            if not before and not inside and length + behind > 17:
                continue  # made from its end on
            have, span = "k" * before + "." * length + "k" * behind, Span(before, before + length + inside)
            arrival = next(w for w in filled(have, [span], 17, overlap) if before + length - 1 in w.frames)
            assert arrival.frames[-1] >= before + length, (length, inside)
            made = sum(before <= frame < before + length for frame in arrival.frames)
            assert overlap > 5 or made >= min(length, 3), "no leap at the end"


def test_pictures_along_a_shot_are_seen_before_they_come() -> None:
    for gap in range(1, 40):
        known = ("." * gap + "k") * 3 + "." * 5
        have = flags(known)
        for window in filled(known, [Span(0, len(known))], 17, 5):
            for frame in window.frames:
                if not have[frame] and frame + 1 < len(have) and known[frame + 1] == "k":
                    assert frame + 1 in window.frames, (gap, frame)
            for frame in window.frames:
                have[frame] = True


def test_a_storyboard_goes_on_or_cuts() -> None:
    on = filled("." * 24, [Span(0, 12), Span(12, 24)], 12, 3)
    assert [w.span for w in on] == [0, 1, 1]
    assert on[1].frames[0] == 9
    cut = filled("." * 12 + "k" + "." * 11, [Span(0, 12), Span(12, 24, cut=True)], 12, 3)
    assert [w.frames for w in cut] == [tuple(range(12)), tuple(range(12, 24))], "nothing is seen across a cut"
    ends = filled("." * 17 + "k" + "." * 15 + "k", [Span(0, 17), Span(17, 34, cut=True)], 17, 5)
    assert [(w.frames, w.span) for w in ends] == [(tuple(range(17)), 0), (tuple(range(17, 34)), 1)]
    third = [Span(0, 17), Span(17, 22, cut=True), Span(22, 34)]
    for end in ("." * 12, "." * 11 + "k"):
        later = filled("." * 17 + "k" + "." * 4 + end, third, 17, 5, sink=2)
        assert later[0].frames == tuple(range(17))
        assert all(w.frames[0] >= 17 for w in later[1:]), "nor by the shots that go on from one behind a cut"
    behind = filled("kkk" + "k" + "." * 7, [Span(3, 11, cut=True)], 6, 2)
    assert all(w.frames[0] >= 3 for w in behind)
    future = filled("." * 9 + "k" + "." * 9 + "kkkk", [Span(0, 9), Span(9, 12, cut=True), Span(12, 19)], 8, 3)
    assert {w.frames[0] >= 9 or w.frames[-1] < 9 for w in future} == {True}


def test_a_sink_keeps_the_first_frame_in_sight() -> None:
    sunk = filled("." * 40, [Span(0, 40)], 17, 2, sink=4)
    assert sunk[0].times is None
    for window in sunk[1:]:
        assert window.frames[0] == 0
        assert window.times is not None
        assert window.times[:2] == (0, 4)
        assert max(window.times) <= 16, "places that training has seen"
    with pytest.raises(UserError, match="cannot look back"):
        plan(flags("." * 40), [Span(0, 40)], 17, 2, sink=15)
    with pytest.raises(UserError, match="cannot look back"):
        plan(flags("k" * 12 + "." * 5), [Span(12, 17)], 17, 5, sink=15)  # for ever, otherwise


def test_a_timeline_tells_nothing_where_nothing_is_known() -> None:
    line = Timeline(clip(3), (False, False, False))
    assert bool((line.given(range(3)).mask == 1).all())


def test_a_canvas_and_a_box() -> None:
    film = torch.rand(1, 3, 2, 4, 6)
    canvas, mask = around(film, (6, 10))
    assert canvas.shape == (1, 3, 2, 6, 10)
    assert torch.equal(canvas[:, :, :, 1:5, 2:8], film)
    assert torch.equal(canvas[:, :, :, 0, 2:8], film[:, :, :, 0])
    assert mask.shape == (2, 6, 10)
    assert mask[:, 1:5, 2:8].eq(0).all()
    assert mask.sum() == 2 * (60 - 24)
    with pytest.raises(UserError, match="leaves nothing around"):
        around(film, (4, 6))
    assert box((3, 4, 5), 1, 2, 3, 5, 1, 2).sum() == 2 * 3
    for wrong in ((0, 0, 0, 2), (0, 0, 5, 2), (-1, 0, 2, 2), (0, 0, 2, 2, 2, 2), (0, 0, 2, 2, 0, 4)):
        with pytest.raises(UserError, match="is empty or leaves the film"):
            box((3, 4, 5), *wrong)


def test_a_layout_is_resized_in_space_alone() -> None:
    small = clip(3)
    large = resized(small, (6, 8))
    assert large.shape == (2, 3, 3, 6, 8)
    assert resized(small, (4, 4)) is small
    flat = resized(small.mean((3, 4), keepdim=True).expand(-1, -1, -1, 4, 4), (6, 8))
    torch.testing.assert_close(flat, small.mean((3, 4), keepdim=True).expand_as(flat))


@pytest.mark.parametrize("strides", [Strides(1, 8, 8), Strides(4, 8, 8)])
def test_a_cell_is_made_anew_if_any_of_its_pixels_is(strides: Strides) -> None:
    mask = torch.zeros(1, 9, 16, 24)
    mask[0, 6, 8, 17] = 1.0
    small = cells(mask, strides)
    T = 9 if strides.t == 1 else 3
    assert small.shape == (1, T, 2, 3)
    assert small.sum() == 1
    assert small[0, 6 if strides.t == 1 else 2, 1, 2] == 1
    first = torch.zeros(1, 9, 16, 24)
    first[0, 0] = 1.0
    assert cells(first, strides)[0].flatten(1).amax(1).tolist() == [1.0] + [0.0] * (T - 1)


def test_inpainting_keeps_what_is_outside() -> None:
    film, mask = torch.rand(1, 3, 5, 16, 16), torch.zeros(1, 5, 16, 16)
    mask[:, :, 4:9, 4:9] = 1
    given = inpaint(torch.randn(1, 8, 5, 2, 2), mask, Strides(1, 8, 8))
    assert given.mask[0, 0].tolist() == [[1, 1], [1, 1]]
    back = put_back(torch.zeros_like(film), film, mask)
    assert back[:, :, :, 4:9, 4:9].eq(0).all()
    assert torch.equal(back[..., 9:], film[..., 9:])
    with pytest.raises(UserError, match="covers nothing"):
        inpaint(torch.randn(1, 8, 5, 2, 2), mask * 0, Strides(1, 8, 8))
    with pytest.raises(UserError, match="of the film's size"):
        inpaint(torch.randn(1, 8, 5, 2, 3), mask, Strides(1, 8, 8))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("size", [(1, 4, 4), (2, 4, 6), (17, 8, 8)])
def test_a_training_mask_always_leaves_something_to_make(name: str, size: tuple[int, int, int]) -> None:
    for seed in range(12):
        mask = MASKS[name](size, rng(seed))
        assert mask.shape == size
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert mask.any()
        assert torch.equal(mask, MASKS[name](size, rng(seed)))
    if size[0] == 17 and name != "unconditional":
        assert any((MASKS[name](size, rng(seed)) == 0).any() for seed in range(12))


def test_masks_are_drawn_by_their_shares() -> None:
    g = rng()
    names = [draw_name({"first": 3.0, "box": 1.0, "last": 0.0}, g) for _ in range(800)]
    assert 0.7 < names.count("first") / 800 < 0.8
    assert names.count("last") == 0
    with pytest.raises(UserError, match="no mask 'middle'"):
        check_shares({"middle": 1.0})
    with pytest.raises(UserError, match="not all 0"):
        check_shares({"first": 0.0})
