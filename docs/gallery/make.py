"""Makes the pictures of this folder again: `.venv/bin/python docs/gallery/make.py`, or `... make.py lineage` for some of them.

Same weights, same machine, same bytes.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from road import road

import tubelet
from tubelet.core.files import read_json, whole_file
from tubelet.evaluate.tasks import TASKS, Bench
from tubelet.media.encode import save
from tubelet.media.sheet import contact_sheet, save_sheet
from tubelet.worlds import WORLDS

HERE = Path(__file__).parent
TASK_SHEETS = HERE / "tasks"

OPENING = (
    "A large green ball drops and bounces twice.",
    "A medium red square slides steadily to the right along the floor.",
    "A large yellow ball is thrown up to the left.",
    "A medium purple ball slides steadily to the right and hits a resting medium yellow ball.",
    "A large pink ring passes steadily to the right behind a gray wall.",
    "A brush paints a yellow circle, then a horizontal green line from left to right.",
    "A mouth takes two bites out of a cookie from the left.",
)
"""Every composition here is of the training distribution; seeds are 0, and nothing was chosen among seeds. The ball is green
because a blue one bounces only once; of seven colours it is the only one that does."""


def opening() -> None:
    """opening.png and opening.gif: the first seven sentences of the README, seed 0."""
    system = tubelet.load("worlds-64")
    clips = [system.generate(prompt, seed=0).video.to_uint8()[0] for prompt in OPENING]
    save_sheet(contact_sheet(clips, OPENING), HERE / "opening.png")
    save(clips[0].repeat(3, axis=1).repeat(3, axis=2), HERE / "opening.gif", system.config.fps)


def worlds() -> None:
    """worlds.png: one training clip of every kind."""
    rows = [(world, kind) for world in WORLDS.values() for kind in world.kinds]
    episodes = [world.sample(7, kind=kind) for world, kind in rows]
    save_sheet(contact_sheet([e.video for e in episodes], [e.short for e in episodes]), HERE / "worlds.png")


def tasks() -> None:
    """tasks/NAME.png: the first three test episodes of every task, as `tubelet evaluate worlds-64 --tasks` makes them."""
    bench = Bench(tubelet.load("worlds-64", expand=False))
    for name, task in TASKS.items():
        numbers = range(1 if name == "long" else 3)
        films = [task(bench, number, lambda _figure, _value: None) for number in numbers]
        save_sheet(
            contact_sheet(films, [f"{name.replace('_', ' ')}, episode {number}" for number in numbers]),
            TASK_SHEETS / f"{name}.png",
        )


TRAINED = {
    "events": {"ViViT-1/attention.png": "what ViViT 1 looks at", "ViViT-2/attention.png": "what ViViT 2 looks at"},
    "navit-sizes": {"sheet.png": "one clip as each row sees it"},
    "captioner": {"short.png": "test clips under short captions", "dense.png": "test clips under dense captions"},
    "retrieval": {"found.png": "captions, and the clip that each finds among 256"},
    "text-encoders": {"sheet.png": "one prompt, drawn for each reader"},
    "recaptioning": {"sheet.png": "one prompt, drawn by each blend"},
    "scaling": {"scaling.png": "the same sentences and seeds at each share of compute"},
    "ddpm": {"sheet.png": "pictures of the longer chain"},
    "native-sizes": {"native.png": "trained on own sizes", "square.png": "trained on square crops"},
    "unclip": {
        "sheet.png": "pictures for the same prompts",
        "manipulations.png": "variations, mixtures and steps towards other words",
    },
    "unet-or-dit": {"sheet.png": "pictures for the same prompts"},
    "vdt-tasks": {"sheet.png": "a film of each task: what is known, and what is made of it"},
    "walt-long": {"sheet.png": "one film, continued by each row"},
    "autoencoders": {"sheet.png": "one film through each codec"},
    "language-tasks": {"sheet.png": "one film of each task"},
    "vdt-conditioning": {"sheet.png": "one beginning, and what each makes of it"},
    "walt-ablations": {"sheet.png": "one prompt, drawn by each row"},
    "tokenizers": {"curve.png": "what is kept as the vocabulary grows", "sheet.png": "one clip through each tokenizer"},
    "token-models": {"sheet.png": "one prompt, drawn by each model"},
    "cascade": {"sheet.png": "one clip, enlarged in each way"},
    "sound": {"sheet.png": "sounds as spectrograms, films for a sound"},
    "codec-table": {"sheet.png": "one prompt, drawn by the denoiser on each codec"},
}
"""Recipe -> its pictures that docs/lineage.md shows, and what they are of."""
PAGES = {"codec-table": "codecs.md"}
"""Where a recipe's table is shown, when it is not docs/lineage.md."""


def lineage(runs: Path = Path("runs")) -> None:
    """trained/NAME-PICTURE.png, trained/NAME.json and the tables of docs/lineage.md, for those recipes of `TRAINED` that have
    been run."""
    for name, pictures in TRAINED.items():
        if not (runs / name / "table.md").exists():
            continue
        parts = [(runs / name / "table.md").read_text(encoding="utf-8")]
        (HERE / "trained").mkdir(exist_ok=True)
        shutil.copyfile(runs / name / "table.json", HERE / "trained" / f"{name}.json")
        for picture, said in pictures.items():
            copy = HERE / "trained" / f"{name}-{picture.replace('/', '-')}"
            shutil.copyfile(runs / name / picture, copy)
            parts.append(f"![{said}](gallery/trained/{copy.name})\n")
        _between(name, "\n".join(parts), HERE.parent / PAGES.get(name, "lineage.md"))


SYSTEMS = {
    "DDPM (hybrid), pictures, no words": ("ddpm", "hybrid"),
    "latent diffusion's U-Net, pictures": ("unet-or-dit", "U-Net"),
    "DALL-E 2 (prior, best of two), pictures": ("unclip", "diffusion prior, best of two"),
    "DiT (adaLN-Zero), pictures": ("unet-or-dit", "DiT, adaLN-Zero"),
    "VDT (concatenation), films from their beginning": ("vdt-conditioning", "token concatenation"),
    "MAGVIT-v2 (masked model), films": ("token-models", "masked model"),
    "W.A.L.T, films": ("token-models", "W.A.L.T"),
    "VideoPoet (language model), films": ("token-models", "language model"),
    "spacetime in small, films": ("token-models", "spacetime"),
    "true films, as these": ("token-models", "truth"),
}
"""What stands in the table of all systems -> the recipe whose run measured it, and the row there."""
MEASURED: dict[str, tuple[tuple[str, ...], str]] = {
    "colour": (("colour/in",), ".2f"),
    "shape": (("shape/in",), ".2f"),
    "size": (("size/in",), ".2f"),
    "direction": (("direction/in",), ".2f"),
    "event": (("event/in",), ".2f"),
    "Frechet": (("frechet", "frechet/250"), ".1f"),
    "KID": (("kid", "kid/250"), ".2f"),
    "inertia": (("law/inertia",), ".2f"),
    "gravity": (("law/gravity",), ".2f"),
    "steady": (("law/steady",), ".2f"),
    "s a clip": (("seconds", "seconds/250"), ".2f"),
    "parameters": (("parameters",), "M"),
    "MACs": (("macs",), "M"),
}
"""Column -> the figure's names in a run's table, the first that is there, and how it is written."""


def systems() -> None:
    """The one table of all systems that make something, in docs/lineage.md, of the recipes of `SYSTEMS` that have been run; a
    row of an earlier run, whose figures are not in trained/, stays as it stands there."""
    page = HERE.parent / "lineage.md"
    before = page.read_text(encoding="utf-8").split("<!-- systems -->\n")[1].split("<!-- end of systems -->")[0].splitlines()
    lines = ["| | " + " | ".join(MEASURED) + " |", "|---" * (len(MEASURED) + 1) + "|"]
    for name, (recipe, row) in SYSTEMS.items():
        kept = HERE / "trained" / f"{recipe}.json"
        if kept.exists():
            figures = read_json(kept)[row]
            cells = [_written(figures, names, how) for names, how in MEASURED.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        else:
            lines += [line for line in before if line.startswith(f"| {name} |")]
    _between("systems", "\n".join(lines) + "\n", page)


def _written(figures: Mapping[str, float], names: Sequence[str], how: str) -> str:
    found = next((figures[name] for name in names if name in figures), None)
    if found is None:
        return ""
    return f"{found / 1e6:.1f} M" if how == "M" else format(found, how)


def _between(name: str, text: str, page: Path) -> None:
    """Put `text` between the markers of `name` on a page."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    with whole_file(page) as temporary:
        temporary.write_text(before + begin + text + end + rest.split(end)[1], encoding="utf-8")


DRAWN = {drawing.__name__: drawing for drawing in (opening, road, worlds, tasks, lineage, systems)}

if __name__ == "__main__":
    for drawing in sys.argv[1:] or DRAWN:
        DRAWN[drawing]()
