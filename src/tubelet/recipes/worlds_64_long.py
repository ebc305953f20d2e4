"""worlds-64-long: the last part of the shipped system's training, on an accelerator: twice the films of all parts before it.

Paper: the Sora report (2024), "Scaling transformers for video generation": the same network, more compute.
Command: tubelet train worlds-64-long
Cost: the shipped run took 510 s on one H200 with sixteen cores, 498 of them for films; here they first wait for their clips.
Score: in distribution / held out, 200 prompts: colour .94 / .88, shape .94 / .90, size .95 / .83, direction .92 / .88, event
.94 / .90, gravity .94 / .94; more in the README and docs/gallery/tasks.md.

Films of a size take one form (`uniform`), so that few graphs are compiled. The shipped run was a script of the same parts:
one process trained eagerly (2,100 films a second) while another compiled, 78 s, and took the weights over (3,300); three more
read captions and drew masks. It saw 6,000 clips first and the others as they were rendered, drew them with replacement, and
its rates fell with the time. Here all clips are there from the first update, the rates fall with the updates, and one process
does it all: on an accelerator this recipe has not been run as it stands.
"""

from __future__ import annotations

from dataclasses import replace

from tubelet.recipes import worlds_64_gpu
from tubelet.recipes.worlds import WorldsRecipe

KINDS = {
    "billiard": 0.22,
    "collision": 0.14,
    "paint": 0.16,
    "slide": 0.06,
    "fall": 0.11,
    "bounce": 0.09,
    "parabola": 0.09,
    "occlude": 0.05,
    "eat": 0.08,
}
"""What the parts before left at 1.00 of films comes a little less often."""


def recipe() -> WorldsRecipe:
    """Goes on from where `tubelet train worlds-64-decoder` leaves its system."""
    before = worlds_64_gpu.recipe()
    return replace(
        before,
        start="runs/worlds-64-decoder/system",
        clips=replace(before.clips, denoiser=200_000, first=100_000_000, kinds=KINDS),
        uniform=True,
        sampling=replace(
            before.sampling,
            guidance=2.0,
            interval=(0.5, 0.9),
            solver="dpmpp_2m_sde",
            shift=8.0,
            eta=3.0,
            eta_above=0.7,
        ),
        workers=10,
        denoise=replace(before.denoise, steps=7842, compile=True),
    )
