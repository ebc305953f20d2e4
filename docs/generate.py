"""Write the pages that the code itself states (`make docs`). A test goes red when they are stale."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tubelet.catalogue import MODELS, count
from tubelet.cli import VERBS
from tubelet.codecs import CODECS, build_codec
from tubelet.core.files import whole_file
from tubelet.diffusion.solvers import SOLVERS
from tubelet.evaluate import report
from tubelet.evaluate.laws import LAWS
from tubelet.recipes import RECIPES
from tubelet.text import TEXT_ENCODERS
from tubelet.worlds import WORLDS
from tubelet.worlds.violate import VIOLATIONS

HERE = Path(__file__).parent
NOTICE = "<!-- Written by docs/generate.py from the code: change the code, then run `make docs`. -->"


def cli() -> str:
    """docs/cli.md: every verb with its words, options and defaults."""
    parts = [
        "# The command line",
        NOTICE,
        "Answers go to stdout, everything else (notes, progress, errors) to stderr. Exit code 0 is success, 2 a wrong input "
        "(one sentence that ends with the remedy, and nothing half-written), 130 a run that was stopped. "
        "`tubelet VERB --help` prints what stands here.",
    ]
    for name, verb in VERBS.items():
        said = attribute_docs(verb)
        hints = typing.get_type_hints(verb, include_extras=True)
        rows = []
        fields = {field.name: field for field in dataclasses.fields(verb)}
        for field in (fields[name] for name in said):
            rows.append((_option(field, hints[field.name]), _default(field, hints[field.name]), said[field.name]))
        parts += [f"## tubelet {name}", f"{inspect.getdoc(verb)}", table(("", "default", ""), rows)]
    return "\n\n".join(parts) + "\n"


def catalogue() -> str:
    """docs/catalogue.md: everything that can be asked for by name."""
    parts = ["# Catalogue", NOTICE, "What can be asked for by name, counted and read from the code."]
    rows = []
    for name, entry in MODELS.items():
        counted = count(name)
        rows.append((f"`{name}`", _millions(counted["parameters"]), _billions(counted["macs"]), entry.stated(entry.config)))
    parts += [
        "## Models",
        "Multiply-accumulates are of one forward at batch 1 on the stated input; `tubelet models NAME --json` prints exact "
        "figures.",
        table(("name", "parameters", "multiply-accumulates", "input"), rows),
        "## Codecs",
        "With their default settings; multiply-accumulates per frame of 64 x 64 pixels, over a clip of 17.",
        table(("name", "", "strides", "channels", "parameters", "encode", "decode"), [_codec(name) for name in CODECS]),
        "## Solvers",
        "Orders are measured by a test. An evaluation is one forward of the denoiser (two halves of a batch under guidance).",
        table(
            ("name", "order", "evaluations a step", "random", ""),
            [
                (f"`{name}`", s.order, s.evaluations, "yes" if s.stochastic else "no", _sentence(s.solve))
                for name, s in SOLVERS.items()
            ],
        ),
        "## Text encoders",
        table(
            ("name", "settings", ""),
            [(f"`{name}`", _fields(e.config), _sentence(_module(e.config))) for name, e in TEXT_ENCODERS.items()],
        ),
        "## Worlds",
        table(
            ("name", "kinds", "splits", ""),
            [
                (f"`{name}`", ", ".join(world.kinds), ", ".join(world.splits), _sentence(_module(type(world))))
                for name, world in WORLDS.items()
            ],
        ),
        "## Laws",
        table(
            ("name", "judged on", "violated controls", ""),
            [
                (f"`{name}`", ", ".join(law.kinds), ", ".join(VIOLATIONS.get(name, {})) or "-", _sentence(law.judge))
                for name, law in LAWS.items()
            ],
        ),
        "## Recipes",
    ]
    for name in RECIPES:
        header = inspect.getdoc(importlib.import_module(RECIPES[name])) or ""
        parts += [f"### {name}", "```text\n" + header + "\n```"]
    return "\n\n".join(parts) + "\n"


FIGURES = (
    ("colour", "caption/colour", ".99 / .97"),
    ("direction", "caption/direction", ".99 / .97"),
    ("shape", "caption/shape", ".90 / .87"),
    ("size", "caption/size", ".95 / .92"),
    ("event", "caption/event", ".92 / .88"),
    ("gravity within 15 %", "law/gravity", ".85"),
    ("inertia, CV < .2", "law/inertia", ".85"),
    ("inertia, CV < .1", "law/inertia_strict", ""),
    ("momentum", "law/momentum", ""),
    ("energy", "law/energy", ""),
    ("impenetrability", "law/impenetrability", ".95"),
    ("permanence", "law/permanence", ".93"),
    ("paint persistence", "law/paint", ".80"),
    ("bites", "law/bites", ""),
    ("steady outline", "law/steady", ".80"),
)
"""README's name of a figure, its name in the report, and what it is held to (films / held-out compositions)."""


def readme() -> str:
    """README.md with its tables of figures as docs/worlds-64.json has them, and docs/worlds-64-as-written.json those of prompts
    that nothing rewrites; the rest is written by hand."""
    figures = json.loads((HERE / "worlds-64.json").read_text(encoding="utf-8"))
    written = json.loads((HERE / "worlds-64-as-written.json").read_text(encoding="utf-8"))

    def cells(names: Iterable[str], of: dict[str, float] = figures) -> list[str]:
        return [f"{of[name]:.2f}" if name in of else "" for name in names]

    def worst(name: str) -> str:
        controls = [figures[at] for split in ("in", "held_out") if (at := f"{name}/{split}/control") in figures]
        return f"{max(controls):.2f}" if controls else ""

    beside = ("in", "held_out", "in/floor", "in/ceiling", "in/chance")
    rows = [
        (
            said,
            *cells(f"{name}/{what}" for what in beside),
            worst(name),
            goal,
            " / ".join(cells((f"{name}/in", f"{name}/held_out"), written)),
        )
        for said, name, goal in FIGURES
    ]
    head = (
        "",
        "films",
        "held-out",
        "truth",
        "truth through the codec",
        "chance",
        "worst violated control",
        "goal",
        "prompts as written",
    )
    named = dict.fromkeys(name.split("/")[1] for name in figures if name.startswith("kind/"))
    kinds = sorted(named, key=lambda kind: -figures[f"kind/{kind}/in"])
    shares = [
        (said, *cells((f"kind/{kind}/{split}" for kind in kinds), of))
        for of, names in ((figures, ("films", "held-out")), (written, ("films, prompts as written", "held-out, as written")))
        for split, said in zip(("in", "held_out"), names, strict=True)
    ]
    parts = {
        "figures": table(head, rows),
        "kinds": table(("", *kinds), shares),
    }
    return filled("../README.md", parts)


def tasks() -> str:
    """docs/gallery/tasks.md with its tables as docs/worlds-64-tasks.json has them; the rest is written by hand."""
    figures = json.loads((HERE / "worlds-64-tasks.json").read_text(encoding="utf-8"))
    none = re.compile(r"^-( / -)+$")

    def cell(*names: str) -> str:
        return " / ".join(f"{figures[name]:.2f}" if name in figures else "-" for name in names)

    rows = []
    for task in dict.fromkeys(name.split("/")[1] for name in figures if name.startswith("task/")):
        own = f"task/{task}"
        if f"{own}/caption" not in figures:
            continue
        rows.append(
            (
                task.replace("_", " "),
                cell(*(f"{own}/caption{beside}" for beside in ("", "/floor", "/ceiling", "/chance"))),
                cell(*(f"{own}/seam{beside}" for beside in ("", "/floor", "/ceiling", "/control"))),
                cell(*(f"{own}/within{beside}" for beside in ("", "/floor", "/ceiling", "/control"))),
                cell(*(f"{own}/velocity{beside}" for beside in ("", "/ceiling", "/constant", "/copy"))),
                cell(f"{own}/found", f"{own}/found/ceiling"),
                f"{figures[f'{own}/kept']:.0f}" if f"{own}/kept" in figures else "-",
            )
        )
    head = (
        "",
        "caption: film / truth / codec / nothing made",
        "seam: film / truth / codec / other film",
        "no seam: film / truth / codec / other film",
        "velocity error: film / codec / constant / copy",
        "found: film / codec",
        "kept, dB",
    )
    rows = [[none.sub("-", cell) for cell in row] for row in rows]
    apart = [
        (
            "a storyboard without a picture: caption of the first shot / of the second, which goes on / of the second, after "
            "a cut",
            cell(*(f"task/storyboard/caption/{which}" for which in ("going_on/first", "going_on/second", "cut/second"))),
        ),
        (
            "a way from one film to another: joins against the mean change / both within the changes elsewhere / largest "
            "change on the way against a cut",
            cell("task/connect/seam/two", "task/connect/within/two", "task/connect/jump/two"),
        ),
        (
            "a film made half as large again: caption of the small one / made large from it / made large at once",
            cell("task/refine/caption/small", "task/refine/caption", "task/refine/caption/direct"),
        ),
        (
            "its layout, overlap with the small film: made large from it / made large at once",
            cell("task/refine/structure", "task/refine/structure/direct"),
        ),
    ]
    loops = {
        "closing": cell("task/loop/closing", "task/loop/closing/control"),
        "within": cell("task/loop/within", "task/loop/within/control"),
        "place": cell("task/loop/place", "task/loop/place/control"),
        "colour": cell("task/loop/colour", "task/loop/colour/floor"),
    }
    strengths = sorted({name.rpartition("/")[2] for name in figures if name.startswith("task/edit/caption/")})
    edits = [(s, cell(f"task/edit/caption/{s}"), cell(f"task/edit/structure/{s}")) for s in strengths]
    mixed = [
        (name, *(cell(f"task/blend/{figure}/{name}") for figure in ("first", "last", "caption", "one")))
        for name in (*strengths, "fade")
        if f"task/blend/one/{name}" in figures
    ]
    windows = sorted({int(name.split("/")[3]) for name in figures if name.startswith("task/long/one_of_each/")})
    long = [
        (
            window + 1,
            cell(f"task/long/caption/{window}", f"task/long/caption/{window}/floor"),
            cell(f"task/long/one_of_each/{window}", f"task/long/one_of_each/{window}/floor"),
            cell(f"task/long/stray/{window}", f"task/long/stray/{window}/floor"),
        )
        for window in windows
    ]
    forms = [
        name.removesuffix("/caption") for name in figures if name.startswith(("size/", "length/")) and name.endswith("/caption")
    ]
    forms.sort(key=lambda name: [int(part) for part in name.split("/")[1].split("x")])
    laws = [law for law in LAWS if any(f"{form}/law/{law}" in figures for form in forms)]
    sizes = [
        (
            form.split("/")[1].replace("x", " x "),
            *(cell(*(f"{form}/{what}{beside}" for beside in ("", "/floor", "/ceiling"))) for what in ("caption", *card)),
        )
        for form in forms
        for card in [[f"law/{law}" for law in laws]]
    ]
    parts = {
        "tasks": table(head, rows),
        "loops": table(
            (
                "join against the inner changes: loop / plain film",
                "join within them: loop / plain film",
                "share of them that it exceeds: loop / plain film",
                "colour of its ball: loop / truth",
            ),
            [tuple(loops.values())],
        ),
        "apart": table(("", ""), apart),
        "edits": table(("strength", "caption", "structure kept"), edits),
        "long": table(("window", "caption: film / truth", "one of each: film / truth", "strays: film / truth"), long),
        "blends": table(("strength", "first film kept", "second film kept", "words", "one thing between"), mixed),
        "sizes": table(("size or frames", "caption", *(law.replace("_", ", ") for law in laws)), sizes),
    }
    return filled("gallery/tasks.md", parts)


def splits() -> str:
    """docs/evaluate.md with its table of held-out splits as docs/worlds-64-splits.json has it; the rest is written by hand."""
    figures = json.loads((HERE / "worlds-64-splits.json").read_text(encoding="utf-8"))

    def cell(split: str, *names: str) -> str:
        found = [figures.get(f"split/{split}/{name}") for name in names]
        return " / ".join("-" if value is None else f"{value:.2f}" for value in found)

    rows = [
        (
            said,
            cell(split, "caption", "caption/floor", "caption/ceiling", "caption/trained"),
            cell(split, "velocity", "velocity/trained", "velocity/constant", "velocity/copy"),
            cell(split, "found", "found/trained"),
        )
        for split, said in SPLITS.items()
    ]
    head = (
        "",
        "caption: film / truth / codec / trained twin",
        "velocity error: film / trained twin / constant / copy",
        "found: film / trained twin",
    )
    return filled("evaluate.md", {"splits": table(head, rows)})


SPLITS = {
    "held_out_pair": "colours with shapes never shown together",
    "held_out_size": "sizes with kinds never shown together",
    "hole": "speeds and radii between those shown",
    "shell": "speeds and radii outside of those shown",
    "compose": "two kinds at once",
}
"""Held-out split -> what a reader calls it."""


def thresholds() -> str:
    """The laws' pass marks with the rates that docs/worlds-64.json has of truth, of truth through the shipped codec and of the
    worst violated control."""
    path = Path(report.__file__).parent / "thresholds.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    figures = json.loads((HERE / "worlds-64.json").read_text(encoding="utf-8"))
    beside = {"truth": "floor", "codec": "ceiling", "control": "control"}
    kept["measured"] = {
        law: {
            split: {said: round(figures[f"law/{law}/{split}/{name}"], 3) for said, name in beside.items()}
            for split in ("in", "held_out")
        }
        for law in LAWS
    }
    return json.dumps(kept, indent=1) + "\n"


def filled(page: str, parts: dict[str, str]) -> str:
    """A page with each of its marked places drawn anew."""
    text = (HERE / page).read_text(encoding="utf-8")
    for name, drawn in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        before, rest = text.split(begin)
        text = before + begin + drawn + "\n" + end + rest.split(end)[1]
    return text


PAGES = {
    "cli.md": cli,
    "catalogue.md": catalogue,
    "../README.md": readme,
    "gallery/tasks.md": tasks,
    "evaluate.md": splits,
    "../src/tubelet/evaluate/thresholds.json": thresholds,
}


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def attribute_docs(cls: type) -> dict[str, str]:
    """The string under each attribute of a class, by name, its own attributes before those of its bases."""
    tree = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(tree, ast.ClassDef)
    said: dict[str, str] = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            assert isinstance(below.value, ast.Constant)
            said[field.target.id] = " ".join(str(below.value.value).split())
    for base in cls.__bases__:
        if base is not object:
            said = {**said, **{name: text for name, text in attribute_docs(base).items() if name not in said}}
    return said


def _setting(hint: Any, name: str) -> Any:
    """What `tyro.conf.arg` says of an option."""
    stack = [hint]
    while stack:
        item = stack.pop()
        for value in getattr(item, "__metadata__", ()):
            if getattr(value, name, None) is not None:
                return getattr(value, name)
        stack += typing.get_args(item)
    return None


def _option(field: dataclasses.Field[Any], hint: Any) -> str:
    positional, option = "Positional" in str(field.type), field.name.replace("_", "-")
    if field.type == "bool" or "[bool," in str(field.type):
        return f"`--no-{option}`" if field.default is True else f"`--{option}`"
    kind = _setting(hint, "metavar") or str(field.type).upper()
    return f"`{kind}`" if positional else f"`--{option} {kind}`"


def _default(field: dataclasses.Field[Any], hint: Any) -> str:
    stated = _setting(hint, "help_behavior_hint")
    if stated is not None:
        return str(stated).strip("()").removeprefix("default: ")
    return "required" if field.default is dataclasses.MISSING else str(field.default)


def _codec(name: str) -> tuple[Any, ...]:
    with torch.device("meta"), torch.no_grad():
        codec = build_codec(name)
        with FlopCounterMode(display=False) as encode:
            latents = codec.encode(torch.zeros(1, 3, 17, 64, 64))
        with FlopCounterMode(display=False) as decode:
            codec.decode(latents)
    strides = f"{codec.strides.t} x {codec.strides.h} x {codec.strides.w}"
    work = [f"{counter.get_total_flops() / 2 / 17 / 1e6:.1f} M" for counter in (encode, decode)]
    said = _sentence(_module(CODECS[name].config))
    return f"`{name}`", said, strides, codec.channels, _millions(sum(p.numel() for p in codec.parameters())), *work


def _module(cls: type) -> Any:
    return importlib.import_module(cls.__module__)


def _sentence(thing: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")


def _fields(config: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(config))


def _millions(value: int) -> str:
    return f"{value / 1e6:.1f} M"


def _billions(value: int) -> str:
    return f"{value / 1e9:.2f} G"


if __name__ == "__main__":
    for page, write in PAGES.items():
        with whole_file(HERE / page) as temporary:
            temporary.write_text(write(), encoding="utf-8")
