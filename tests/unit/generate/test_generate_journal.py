"""An interrupted film goes on where it stopped, bit for bit, whatever the task; no wrong answer is ever given again."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tubelet.codecs import build_codec
from tubelet.core.types import Condition, Video
from tubelet.generate import journal
from tubelet.generate.clip import Clip
from tubelet.generate.engine import Sampling
from tubelet.generate.folder import save_system
from tubelet.generate.journal import Recorded, recorded
from tubelet.generate.system import Rolling, Shot, System, load
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.text.bpe import train
from tubelet.text.own import OwnTextConfig, OwnTextEncoder

WORDS = "a red ball falls"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> System:
    torch.manual_seed(0)
    codec = build_codec("causal_conv", {"channels": 4, "fine_width": 16, "coarse_width": 16, "decoder_blocks": [1, 1, 1]})
    denoiser = Spacetime(SpacetimeConfig(width=32, depth=1, heads=2, in_channels=4, patch=(1, 2, 2), text_width=32))
    text = OwnTextEncoder(OwnTextConfig(vocab_size=300, width=32, depth=1, heads=2), train([WORDS] * 4, 280))
    for parameter in denoiser.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path_factory.mktemp("systems") / "tiny"
    parts = {"codec": ("causal_conv", codec), "denoiser": ("spacetime", denoiser), "text": ("own", text)}
    save_system(folder, name="tiny", **parts, size=(32, 32), frames=5, fps=8.0, defaults=Sampling(steps=3))  # type: ignore[arg-type]
    return load(folder, device="cpu", dtype="float32")


def picture(seed: int) -> Video:
    return Video(torch.rand(1, 3, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1, 8.0)


Make = Callable[[System], Clip]
TASKS: dict[str, tuple[Make, int]] = {
    "plain": (lambda s: s.generate(WORDS, seed=1), 3),
    "heun": (lambda s: s.generate(WORDS, seed=1, solver="heun"), 5),
    "random solver": (lambda s: s.generate(WORDS, seed=1, solver="ddpm"), 3),
    "loop": (lambda s: s.generate(WORDS, seed=1, loop=True), 3),
    "rolling": (lambda s: s.film([Shot(WORDS, 9)], seed=1, rolling=Rolling(sink=1)), 9),
    "first and last": (lambda s: s.film([Shot(WORDS, 5, {0: picture(1), -1: picture(2)})], seed=1), 3),
    "edit": (lambda s: s.edit(picture(3), WORDS, 0.5, seed=1), 3),
    "pictures": (lambda s: s.generate_batch([WORDS] * 3, [1, 2, 3], frames=1, batch=2)[2], 6),
}
"""Films of every kind, and how often the denoiser is asked for each."""


class Died(BaseException):
    """A process that ends here and now."""


class Mortal(nn.Module):
    """A network that dies when it is asked for the n-th time."""

    def __init__(self, network: nn.Module, lives: int) -> None:
        super().__init__()
        self.network, self.config, self.lives = network, network.config, lives

    def forward(self, *question: Tensor, **more: Tensor) -> Tensor:
        if self.lives == 0:
            raise Died
        self.lives -= 1
        return self.network(*question, **more)


def interrupted(system: System, make: Make, folder: Path, lives: int, digest: str = "film") -> None:
    written, network = recorded(system, folder, digest)
    network.network = Mortal(network.network, lives)
    with pytest.raises(Died):
        make(written)


def resumed(system: System, make: Make, folder: Path, digest: str = "film") -> tuple[Tensor, int]:
    """The film's pixels, and how many answers came from the folder."""
    written, network = recorded(system, folder, digest)
    return make(written).video.pixels, network.replayed


@pytest.mark.parametrize("task", TASKS)
def test_a_film_killed_after_any_answer_goes_on_bit_for_bit(system: System, task: str, tmp_path: Path) -> None:
    make, asked = TASKS[task]
    whole = make(system).video.pixels
    for lives in range(asked):
        folder = tmp_path / str(lives)
        interrupted(system, make, folder, lives)
        pixels, replayed = resumed(system, make, folder)
        assert torch.equal(pixels, whole), f"killed after {lives} answers"
        assert replayed == lives
    again, replayed = resumed(system, make, tmp_path / "0")
    assert torch.equal(again, whole)
    assert replayed == asked, "a finished film needs no network"


def test_a_film_may_be_killed_many_times(system: System, tmp_path: Path) -> None:
    make, asked = TASKS["rolling"]
    for stop in range(asked):
        interrupted(system, make, tmp_path / "film", 1 if stop else 0)
    pixels, replayed = resumed(system, make, tmp_path / "film")
    assert replayed == asked - 1
    assert torch.equal(pixels, make(system).video.pixels)


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty", "remove", "exchange", "no shape"])
def test_a_torn_answer_ends_the_replay(system: System, harm: str, tmp_path: Path) -> None:
    make, asked = TASKS["rolling"]
    folder = tmp_path / "film"
    interrupted(system, make, folder, asked - 1)
    path = sorted(folder.iterdir())[4]
    data = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    elif harm == "exchange":
        path.write_bytes(sorted(folder.iterdir())[5].read_bytes())
    elif harm == "no shape":
        head = b'{"000000":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}'
        path.write_bytes(len(head).to_bytes(8, "little") + head)
    elif harm == "flip":
        data[-3] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(data[:-7] if harm == "truncate" else b"")
    pixels, replayed = resumed(system, make, folder)
    assert replayed == 4
    assert torch.equal(pixels, make(system).video.pixels)
    assert resumed(system, make, folder)[1] == asked, "what was computed anew was kept"


def test_answers_to_another_question_are_not_given(system: System, tmp_path: Path) -> None:
    make, asked = TASKS["rolling"]
    others: dict[str, Make] = {
        "seed": lambda s: s.generate(WORDS, seed=2),
        "words": lambda s: s.generate("a blue box", seed=1),
        "size": lambda s: s.generate(WORDS, (32, 48), seed=1),
    }
    for name, other in others.items():
        folder = tmp_path / name
        interrupted(system, make, folder, asked - 1)
        pixels, replayed = resumed(system, other, folder)
        assert replayed == 0, name
        assert torch.equal(pixels, other(system).video.pixels)
        assert len(list(folder.iterdir())) == 3, "the other film's answers are gone"


def test_answers_of_other_networks_or_wishes_are_not_given(system: System, tmp_path: Path) -> None:
    make, asked = TASKS["plain"]
    interrupted(system, make, tmp_path / "film", asked - 1)
    assert resumed(system, make, tmp_path / "film", "another film")[1] == 0
    assert resumed(system, make, tmp_path / "film", "another film")[1] == asked
    other = dataclasses.replace(system, config=dataclasses.replace(system.config, files={"denoiser.safetensors": "other"}))
    assert other.digest != system.digest
    assert resumed(other, make, tmp_path / "film", "another film")[1] == 0


def test_a_full_disk_ends_the_journal_and_not_the_film(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, asked = TASKS["rolling"]
    save, room = journal.save_file, [5]

    def saved(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if room[0] == 0:
            Path(path).write_bytes(b"half of")
            raise OSError(errno.ENOSPC, "no room")
        room[0] -= 1
        save(tensors, path, metadata)

    monkeypatch.setattr(journal, "save_file", saved)
    pixels, _ = resumed(system, make, tmp_path / "film")
    assert torch.equal(pixels, make(system).video.pixels)
    assert [path.name for path in sorted((tmp_path / "film").iterdir())] == [f"{n:06d}.safetensors" for n in range(5)]
    monkeypatch.undo()
    pixels, replayed = resumed(system, make, tmp_path / "film")
    assert (replayed, asked) == (5, 9)
    assert torch.equal(pixels, make(system).video.pixels)


def test_a_place_that_is_no_folder_ends_the_journal_and_not_the_film(system: System, tmp_path: Path) -> None:
    (tmp_path / "film").write_text("in the way")
    make, _ = TASKS["plain"]
    assert torch.equal(resumed(system, make, tmp_path / "film")[0], make(system).video.pixels)
    assert (tmp_path / "film").read_text() == "in the way"


def test_what_a_killed_process_left_half_written_is_cleared(system: System, tmp_path: Path) -> None:
    make, asked = TASKS["plain"]
    interrupted(system, make, tmp_path, 2)
    (tmp_path / "000002.77.part").write_bytes(b"half")
    resumed(system, make, tmp_path)
    assert len(list(tmp_path.iterdir())) == asked


def test_answers_reach_the_disk_every_few(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(journal, "_sync", lambda paths: synced.extend(path.name for path in paths))
    interrupted(system, TASKS["rolling"][0], tmp_path / "film", 8)
    assert synced == [
        *(f"{n:06d}.safetensors" for n in range(4)), "film", *(f"{n:06d}.safetensors" for n in range(4, 8)), "film"
    ]  # fmt: skip


def test_it_stands_in_for_the_network(system: System, tmp_path: Path) -> None:
    written, network = recorded(system, tmp_path / "film", "film")
    assert network.config is system.denoiser.config
    assert [p.data_ptr() for p in network.parameters()] == [p.data_ptr() for p in system.denoiser.parameters()]
    assert written.device == system.device
    assert written.engine.strides == system.engine.strides


@torch.inference_mode()
def test_packed_answers_are_kept_too(system: System, tmp_path: Path) -> None:
    z = [torch.randn(4, 3, 4, 4), torch.randn(4, 1, 6, 4)]
    sigma = [torch.tensor(0.5), torch.tensor(0.25)]
    condition = Condition.cat([system.text.encode([WORDS]), system.text.encode(["a box"])])
    network: nn.Module = Spacetime(system.denoiser.config)
    network.load_state_dict(system.denoiser.state_dict())
    first = Recorded(network, tmp_path, "packs").forward_packed(z, sigma, condition)
    again = Recorded(Mortal(network, 0), tmp_path, "packs")
    for kept, computed, plain in zip(
        again.forward_packed(z, sigma, condition), first, network.forward_packed(z, sigma, condition), strict=True
    ):
        assert torch.equal(kept, computed)
        assert torch.equal(kept, plain)
    assert again.replayed == 1


def test_someone_may_watch_a_film_become(system: System) -> None:
    seen: list[Tensor] = []
    watched = dataclasses.replace(system, engine=dataclasses.replace(system.engine, watch=lambda x: seen.append(x.clone())))
    clip = watched.generate(WORDS, seed=1)
    assert [x.shape for x in seen] == [(1, 4, 5, 4, 4)] * 3
    assert torch.equal(system.engine.decode(seen[-1]), clip.video.pixels), "the last guess is the film"
    assert not torch.equal(seen[0], seen[-1])


def test_an_edit_is_guided_down_to_the_end(system: System) -> None:
    """An interval that ends above an edit's first noise level would leave it without any guidance."""
    defaults = dataclasses.replace(system.config.defaults, guidance=3.0, interval=(0.5, 0.9))
    above = dataclasses.replace(system, config=dataclasses.replace(system.config, defaults=defaults))
    assert above.edit(picture(3), WORDS, 0.4, seed=1).settings["interval"] == [0.0, 0.9]
    assert above.edit(picture(3), WORDS, 1.0, seed=1).settings["interval"] == [0.5, 0.9]
    guided = [
        above.edit(picture(3), WORDS, s, seed=1, guidance=g).settings["guidance"]
        for s, g in ((0.4, None), (1.0, None), (0.4, 2.0))
    ]
    assert guided == [4.5, 3.0, 2.0]
    unguided = above.edit(picture(3), WORDS, 0.4, seed=1, guidance=1.0)
    assert not torch.equal(unguided.video.pixels, above.edit(picture(3), WORDS, 0.4, seed=1).video.pixels)
